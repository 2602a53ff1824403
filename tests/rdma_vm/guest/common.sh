# Sourced by the guest scripts: the RDMA device, and pytest with as few imports as can be (each is slow in emulation).
export REQUIRE_RDMA=1 LORASERVE_REQUIRE_EXTENSION=1 OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=1
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1
PATH=$PATH:/usr/sbin:/sbin

make_device() { # make_device NETDEV
  rdma link add rxe0 type rxe netdev "$1" || echo "no Soft-RoCE on $1"
  rdma link
  ibv_devices
}

run_tests() { # run_tests FILE...
  "$PYTHON" -m pytest --color=no -p no:cacheprovider -W ignore::pytest.PytestConfigWarning -v --durations=5 "$@"
}
