# Open a TAP in the network namespace of a process, as the daemon of GNU Guix
# does, and become a program that is given it as descriptor 9. As there, it may
# make no sockets but those of IP, and socketpair(2) pretends to work.
#
#   tapfd.py PID TAPNAME PROGRAM [ARGUMENT]...
import ctypes
import fcntl
import os
import platform
import socket
import struct
import sys

TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
pid, name = sys.argv[1:3]
near, far = socket.socketpair()
if os.fork() == 0:
    libc = ctypes.CDLL(None, use_errno=True)
    # Both are opened before either is entered.
    for space in [os.open("/proc/%s/ns/%s" % (pid, kind), os.O_RDONLY) for kind in ("user", "net")]:
        if libc.setns(space, 0):
            raise OSError(ctypes.get_errno(), "setns")
    tun = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI))
    socket.send_fds(far, [b"."], [tun])
    os._exit(0)
far.close()
_, fds, _, _ = socket.recv_fds(near, 1, 1)
near.close()
os.dup2(fds[0], 9)

SOCKET, SOCKETPAIR = {"x86_64": (41, 53), "aarch64": (198, 199)}[platform.machine()]
LOAD, JUMP_EQUAL, RETURN, ALLOW, ERRNO, ENOSYS = 0x20, 0x15, 0x06, 0x7FFF0000, 0x00050000, 38
program = b"".join(struct.pack("HBBI", *i) for i in [
    (LOAD, 0, 0, 0),  # the system call
    (JUMP_EQUAL, 0, 1, SOCKETPAIR),
    (RETURN, 0, 0, ERRNO),
    (JUMP_EQUAL, 1, 0, SOCKET),
    (RETURN, 0, 0, ALLOW),
    (LOAD, 0, 0, 16),  # its first argument
    (JUMP_EQUAL, 1, 0, socket.AF_INET),
    (JUMP_EQUAL, 0, 1, socket.AF_INET6),
    (RETURN, 0, 0, ALLOW),
    (RETURN, 0, 0, ERRNO | ENOSYS),
])
buffer = ctypes.create_string_buffer(program)
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
prctl = ctypes.CDLL(None, use_errno=True).prctl
prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
filter = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
if prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.c_char_p(filter), 0, 0):
    raise OSError(ctypes.get_errno(), "seccomp")
os.execvp(sys.argv[3], sys.argv[3:])
