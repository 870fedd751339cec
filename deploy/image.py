"""A root file system, what the Dockerfile says of it, and how to run a command in it as a container would."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from deploy.dockerfile import Healthcheck, User

BASE_ENVIRONMENT = {"PATH": "/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}

# Mounts vanish with the namespace they were made in. $1 root, $2 rw or ro, $3 volume; the folders to bind up to --.
ENTER = """
set -eu
root=$1 mode=$2 volume=$3; shift 3
mount --bind "$root" "$root"
mount --rbind /dev "$root/dev"
mount -t proc proc "$root/proc"
mount -t sysfs -o ro sysfs "$root/sys"
while [ "$1" != -- ]; do mount --rbind "$1" "$root$1"; shift; done
shift
if [ "$mode" = ro ]; then
    mount -t tmpfs -o noexec,nosuid,nodev tmpfs "$root/tmp"
    mount --bind "$root$volume" "$root$volume"
    mount -o remount,bind,ro "$root"
fi
exec chroot "$@"
"""


@dataclass
class Image:
    """A root file system and what the instructions so far say of it."""

    root: Path
    environment: dict[str, str] = field(default_factory=lambda: dict(BASE_ENVIRONMENT))
    arguments: dict[str, str] = field(default_factory=dict)
    workdir: str = "/"
    user: User = field(default_factory=lambda: User(0, 0))
    volume: str = ""
    health: Healthcheck | None = None
    command: tuple[str, ...] = ()

    def inside(self, path: str) -> Path:
        """A path of the image, relative to its working directory, as a path of this machine."""
        return self.root / str(PurePosixPath(self.workdir) / path).lstrip("/")

    def entering(
        self,
        argv: Sequence[str],
        extra: Mapping[str, str],
        *,
        is_read_only: bool = False,
        binds: Sequence[Path] = (),
    ) -> list[str]:
        """The command line that runs argv as process 1 of a new namespace, as the image's user, in its directory."""
        environment = {"HOME": self._home(), **self.environment, **extra}
        mode = ("ro", self.volume) if is_read_only else ("rw", "")
        return [
            *("unshare", "--mount", "--pid", "--fork", "sh", "-c", ENTER, "sh", str(self.root), *mode),
            *(*map(str, binds), "--", f"--userspec={self.user.uid}:{self.user.gid}", f"--groups={self.user.gid}"),
            *(str(self.root), "env", "-i", f"--chdir={self.workdir}"),
            *(f"{name}={value}" for name, value in environment.items()),
            *argv,
        ]

    def _home(self) -> str:
        accounts = [line.split(":") for line in (self.root / "etc/passwd").read_text().splitlines()]
        return next((account[5] for account in accounts if account[2] == str(self.user.uid)), "/")
