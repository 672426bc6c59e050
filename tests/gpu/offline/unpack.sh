#!/usr/bin/env bash
# On the GPU machine, with what pack.sh made in FROM: all of it into the folder TO, then: source TO/env.sh; cd TO
#   unpack.sh FROM TO          everything              unpack.sh FROM TO source     pdserve alone, again
set -euo pipefail
from=$(cd "$1" && pwd); to=$(mkdir -p "$2" && cd "$2" && pwd); mkdir -p "$to/site" "$to/more" "$to/home"
join() { cat "$from/$1"[0-9] | xz -d -T0 | tar xf - -C "$to/$2"; }
if [ "${3:-all}" = all ]; then
  join vllm site & vllm=$!
  if [ -e "$from/peers0" ]; then join peers site; fi  # no folder of both is written by both
  join small more
  wait $vllm
  # Behind what the machine has itself: its own versions go together.
  echo "import sys; sys.path.append('$to/more')" > "$to/site/sitecustomize.py"
fi
rm -rf "$to/source" "$to/view" "$to/tests"; mkdir "$to/source" "$to/view"
tar xf "$from/source.tar" -C "$to/source"
# The folders at the top are installed under pdserve.
cp -r "$to/source/pdserve" "$to/view/pdserve"
for part in transfer kernels proxy deploy; do cp -r "$to/source/$part" "$to/view/pdserve/$part"; done
cp -r "$to/source/tests" "$to/tests"
version=$(sed -n 's/^version = "\(.*\)"/\1/p' "$to/source/pyproject.toml")
mkdir "$to/view/pdserve-$version.dist-info"
printf 'Metadata-Version: 2.1\nName: pdserve\nVersion: %s\n' "$version" > "$to/view/pdserve-$version.dist-info/METADATA"
cat > "$to/env.sh" <<END
export PYTHONPATH=$to/view:$to/site PYTHONSAFEPATH=1 PDSERVE_HOME=$to/home
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_USE_FLASHINFER_SAMPLER=0 TOKENIZERS_PARALLELISM=false
END
source "$to/env.sh"
cd "$to"
python3 -c "import pdserve.transfer.serving, pdserve.proxy, pdserve.bench.suite, vllm; print('vLLM', vllm.__version__, pdserve.__file__)"
touch "$to/ready"
