#!/usr/bin/env bash
# For a GPU machine that reaches no registry (Python 3.12, torch 2.11 for CUDA 13, transformers): vLLM 0.26, its peers, what pdserve
# needs and pdserve itself, in parts of at most 46 MB.   pack.sh OUT [all | source]      (some minutes; source: a second)
# Left out of vLLM: kernels of FlashAttention 2, MoE and DeepGEMM (FlashAttention 3 serves Hopper; use dense models).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd); root=$(cd "$here/../../.." && pwd)
out=$(mkdir -p "$1" && cd "$1" && pwd); work=$(mktemp -d); trap 'rm -rf "$work"' EXIT

get() { uv pip install --quiet --python-version 3.12 --python-platform x86_64-manylinux_2_35 --no-deps --target "$work/$1" "${@:2}"; }
parts() { rm -f "$out/$1"[0-9]; tar cf - -C "$work/$1" . | xz -T0 -6 | split -b 46000000 -d -a 1 - "$out/$1"; }

if [ "${2:-all}" = all ]; then
  command -v uv >/dev/null || python3 -m pip install --quiet uv
  get vllm vllm==0.26.0 -r "$here/vllm.txt"
  (cd "$work/vllm/vllm" && rm -rf vllm-rs vllm_flash_attn/_vllm_fa2* _moe_C* _qutlass* third_party/fmha_sm100 third_party/deep_gemm/_C*
   find third_party -type d -name include -prune -exec rm -rf {} +)
  get peers -r "$here/peers.txt"
  get small -r "$here/small.txt"
  for what in vllm peers small; do parts $what; done
fi
# What git knows, and what it would take in: without the pages' figures and pictures, which are larger than the rest.
cd "$root"
git ls-files -co --exclude-standard -- ':!docs/measurements' ':!docs/images' ':!docs/pictures' |
  while read -r file; do [ -e "$file" ] && echo "$file"; done | tar cf "$out/source.tar" -T -
ls -l "$out"
