# benchmarks/transfer.py inside the machine: our READs beside ib_read_bw's.
. tests/rdma_vm/guest/common.sh
ip link set dummy0 mtu 4200
ip addr add 10.79.0.1/24 dev dummy0
ip link set dummy0 up
make_device dummy0
"$PYTHON" benchmarks/transfer.py --role guest --mib 32 --rounds 3
