# The image for a CPU or, with --build-arg DEVICE=cuda, for an NVIDIA GPU. deploy/README.md says how to build and run it.
FROM python:3.11-slim

# cpu or cuda. torch's own wheel contains the CUDA libraries, so both use the same base image.
ARG DEVICE=cpu
# An index of torch wheels, from torch's install page. The index of the CPU wheels makes the image gigabytes smaller.
ARG TORCH_INDEX_URL=""

ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1

# On a GPU, Triton needs a C compiler to build the launcher of each kernel when it is first called.
RUN case "$DEVICE" in \
      cpu) ;; \
      cuda) apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/* ;; \
      *) echo "DEVICE must be cpu or cuda, not '$DEVICE'" >&2; exit 1 ;; \
    esac

# The home directory is the volume, so that libraries that write to ~ can do so.
RUN groupadd --gid 10001 server \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /data --shell /usr/sbin/nologin server \
    && install --directory --owner=10001 --group=10001 /data

WORKDIR /app
COPY requirements.txt constraints.txt ./
RUN pip install --no-cache-dir -r requirements.txt -c constraints.txt \
      ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} \
    && if [ "$DEVICE" = cuda ]; then \
         python -c "import sys, torch; sys.exit(None if torch.version.cuda else 'DEVICE=cuda, but this torch has no CUDA')"; \
       fi

COPY LICENSE handler.py models.yaml ./
COPY server ./server
# chmod, because COPY keeps the file modes of the checkout; with a strict umask only the owner could read the files.
RUN chmod -R a+rX . && python -m compileall -q handler.py server

# Triton loads libraries from TRITON_CACHE_DIR, so it cannot be in /tmp, which docker mounts noexec.
ENV HF_HOME=/data TRITON_CACHE_DIR=/data/triton VAE_SERVER_DEVICE=$DEVICE VAE_SERVER_HOST=0.0.0.0

# A number, because Kubernetes' runAsNonRoot cannot verify a user given by name.
USER 10001:10001
VOLUME /data
EXPOSE 8000

# The check ignores the environment's proxy settings. Any status other than 200 fails.
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 CMD ["python", "-c", \
    "import os, ssl, sys, urllib.request as r; t = ssl._create_unverified_context(); p = [os.environ.get(n) for n in ('VAE_SERVER_PORT', 'AIP_HTTP_PORT', 'SAGEMAKER_BIND_TO_PORT')]; u = 'http' + 's' * ('VAE_SERVER_TLS_CERT' in os.environ) + '://127.0.0.1:' + (*filter(None, p), '8000')[0] + '/health'; sys.exit(r.build_opener(r.ProxyHandler({}), r.HTTPSHandler(context=t)).open(u, timeout=4).status != 200)"]

# With this label, a multi-container endpoint of SageMaker tells each container its port. SageMaker runs each with `serve`.
LABEL com.amazonaws.sagemaker.capabilities.accept-bind-to-port=true

# The code's licence, and that of the ffmpeg in imageio-ffmpeg. `make sbom` lists the licences of all packages.
LABEL org.opencontainers.image.licenses="Apache-2.0 AND GPL-3.0-or-later"

ENTRYPOINT ["python", "-m", "server"]
CMD ["serve"]
