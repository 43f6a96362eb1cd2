#!/bin/sh
# Starts child-tuning with the libtorch of this machine: LIBTORCH if it is set, else the PyTorch of python3.
set -eu
wanted=2.11
install="install PyTorch $wanted for python3 (pip install torch==$wanted.0), or set LIBTORCH to the folder of a libtorch $wanted"

stop() {
    echo "error: $*" >&2
    exit 3
}

here=$(dirname -- "$(readlink -f -- "$0")")
further=
if [ -n "${LIBTORCH:-}" ]; then
    torch=$LIBTORCH
    where="LIBTORCH=$LIBTORCH"
else
    # Without importing it, which takes seconds: the folder of torch, and after it what its own rpath does not reach,
    # the libraries of NVIDIA in other folders that python3 installs to.
    found=$(python3 -c '
import glob, importlib.util, os, sys
sys.path = [folder for folder in sys.path if folder]
spec = importlib.util.find_spec("torch")
if spec is None or spec.origin is None:
    sys.exit(1)
torch = os.path.dirname(spec.origin)
print(torch)
for folder in sys.path:
    if os.path.realpath(folder) != os.path.realpath(os.path.dirname(torch)):
        print(*glob.glob(os.path.join(folder, "nvidia", "*", "lib")), sep="\n", end="\n")
' 2>/dev/null) || stop "no PyTorch was found; $install"
    torch=$(printf '%s\n' "$found" | sed -n 1p)
    further=$(printf '%s\n' "$found" | sed -e 1d -e '/^$/d' | tr '\n' ':')
    where="python3's PyTorch at $torch"
fi

# Of a Python package, or of a libtorch from an archive.
version=
if [ -f "$torch/version.py" ]; then
    version=$(sed -n "s/^__version__ = ['\"]\([0-9.]*\).*/\1/p" "$torch/version.py")
elif [ -f "$torch/build-version" ]; then
    version=$(sed 's/+.*//' "$torch/build-version")
fi
case $version in
    "$wanted" | "$wanted".*) ;;
    '') stop "$where has no libtorch with a known version; $install" ;;
    *) stop "$where is version $version, and this program needs $wanted; $install" ;;
esac
[ -e "$torch/lib/libtorch_cuda.so" ] ||
    stop "$where is a build without CUDA, which this program needs also on the CPU; $install"

# For programs that this one starts, such as python3, which finds its libraries by itself.
CHILD_TUNING_OUTER_LIBRARY_PATH=${LD_LIBRARY_PATH:-}
export CHILD_TUNING_OUTER_LIBRARY_PATH
LD_LIBRARY_PATH=$torch/lib${further:+:${further%:}}${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
export LD_LIBRARY_PATH
exec "$here/bin/child-tuning" "$@"
