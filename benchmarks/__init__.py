"""The benchmarks. Every measured number in the docs was printed by a script of this package."""
