# One machine: reader and holder are processes on it. The RDMA device has an interface of its own, with the largest MTU
# that RoCE knows, so that a test can switch that off and leave TCP (on lo) alone.
. tests/rdma_vm/guest/common.sh
ip link set dummy0 mtu 4200
ip addr add 10.79.0.1/24 dev dummy0
ip link set dummy0 up
make_device dummy0
export RDMA_INTERFACE=dummy0
run_tests tests/rdma_vm/test_verbs.py
