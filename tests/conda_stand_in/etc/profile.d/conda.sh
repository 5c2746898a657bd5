# `source` it, as MLflow does, for the function that activates an environment of the stand-in.

_conda_home="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"

conda() {
    if [ "$1" != activate ]; then
        "$_conda_home/bin/conda" "$@"
        return
    fi
    if [ $# -ne 2 ] || [ ! -x "$_conda_home/envs/$2/bin/python" ]; then
        echo "conda stand-in: expected \`conda activate\` and an environment's name, got: $*" >&2
        return 1
    fi
    export CONDA_DEFAULT_ENV="$2" CONDA_PREFIX="$_conda_home/envs/$2"
    export PATH="$CONDA_PREFIX/bin:$PATH"
}
