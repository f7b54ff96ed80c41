#!/bin/sh
# Makes the CPU environment: torch by itself first, then the lock without dependency resolution, then this package.
# torchvision, torchaudio and torchcodec are left out on purpose: their registry builds are linked to CUDA and do not import here.
set -eu
"$PYTHON" - <<'EOF'
import sys
if sys.version_info < (3, 11):
    sys.exit(f"steer needs Python 3.11 or newer; this is {sys.version.split()[0]}. Name another with: make PYTHON=/path/to/python3.11")
EOF
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
pip() { "$VENV/bin/python" -m pip "$@" --disable-pip-version-check; }
installed() { "$VENV/bin/python" -c "import torch, sys; sys.exit(torch.__version__.split('+')[0] != '$1')" 2>/dev/null; }
TORCH=2.13.0
if ! installed "$TORCH"; then
    # PyTorch's own index has the small CPU build everywhere; where it does not answer, the default index serves
    pip install --quiet --retries 0 --timeout 10 --index-url https://download.pytorch.org/whl/cpu "torch==$TORCH" 2>/dev/null \
        || pip install --quiet "torch==$TORCH"
fi
pip install --quiet --no-deps -r requirements-cpu.lock
pip install --quiet --no-deps --no-build-isolation -e .
"$VENV/bin/python" -c "import steer; print('steer', steer.__version__, 'is set up')"
