# Be a virtual machine's network card for who listens at a BESS socket: open a
# TAP in this network namespace and carry frames between the two.
#
#   bess.py SOCKET TAPNAME
import fcntl
import os
import selectors
import socket
import struct
import sys
import time

TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
LARGEST = 1 << 17

path, name = sys.argv[1:3]
tap = os.open("/dev/net/tun", os.O_RDWR)
fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI))
while True:
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        peer.connect(path)
        break
    except OSError:
        peer.close()
        time.sleep(0.05)
ready = selectors.DefaultSelector()
ready.register(tap, selectors.EVENT_READ, lambda: peer.send(os.read(tap, LARGEST)))
ready.register(peer, selectors.EVENT_READ, lambda: os.write(tap, peer.recv(LARGEST)))
while True:
    for key, _ in ready.select():
        try:
            key.data()
        except ConnectionError:
            sys.exit()
        except OSError:
            pass  # the interface is not up yet
