# Node 0 of two: serves an adapter until it is switched off.
. tests/rdma_vm/guest/common.sh
ip addr add 10.78.0.10/24 dev eth0
ip link set eth0 up
make_device eth0
sleep 600 | "$PYTHON" tests/transfer/holder.py 8 node-0 auto 10.78.0.10 7700
