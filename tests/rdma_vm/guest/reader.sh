# Node 1 of two: reads from node 0 over the wire between them.
. tests/rdma_vm/guest/common.sh
ip addr add 10.78.0.11/24 dev eth0
ip link set eth0 up
make_device eth0
HOLDER=10.78.0.10:7700 run_tests -s tests/rdma_vm/test_two_machines.py
