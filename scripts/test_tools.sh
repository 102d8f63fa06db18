#!/usr/bin/env bash
# What the tests use beside Python: a real SLURM, and shellcheck. Called by `make test`; takes no time where they are there.
# As root, or with passwordless sudo, they are installed (3 MB); else their tests are skipped, and this says how to have them.
set -euo pipefail

packages=()
command -v shellcheck >/dev/null || packages+=(shellcheck)
PATH=$PATH:/usr/sbin:/sbin
for program in slurmctld slurmd munged:munge sbatch:slurm-client; do
  command -v "${program%:*}" >/dev/null || packages+=("${program#*:}")
done
((${#packages[@]})) || exit 0

become=()
if (($(id -u) != 0)); then become=(sudo -n); fi
if ! command -v apt-get >/dev/null || ! "${become[@]}" true 2>/dev/null; then
  echo "test: some tests will be skipped; for all of them, as root: apt-get install --no-install-recommends ${packages[*]}"
  exit 0
fi
echo "test: installing ${packages[*]} with apt-get"
"${become[@]}" apt-get update -qq
"${become[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install --no-install-recommends -y -qq -o Dpkg::Use-Pty=0 \
  "${packages[@]}" >/dev/null
