import socket,sys,time,struct,os
# attach to a BESS socket as a guest: ARP for the gateway, then DHCP-less ping
p=sys.argv[1]
for _ in range(100):
    try:
        s=socket.socket(socket.AF_UNIX,socket.SOCK_SEQPACKET); s.connect(p); break
    except OSError: time.sleep(0.05)
mac=bytes.fromhex('020000000001'); me=socket.inet_aton('10.0.2.100'); gw=socket.inet_aton('10.0.2.2')
s.settimeout(3)
s.send(b'\xff'*6+mac+b'\x08\x06'+struct.pack('!HHBBH',1,0x800,6,4,1)+mac+me+b'\0'*6+gw)
while 1:
    f=s.recv(70000)
    if f[12:14]==b'\x08\x06' and f[20:22]==b'\0\2': break
gm=f[22:28]
def csum(b):
    t=sum(struct.unpack('!%dH'%(len(b)//2),b)); t=(t&0xffff)+(t>>16); t=(t&0xffff)+(t>>16); return ~t&0xffff
ic=struct.pack('!BBHHH',8,0,0,7,1)+b'abcdefgh'; ic=ic[:2]+struct.pack('!H',csum(ic))+ic[4:]
ih=struct.pack('!BBHHHBBH',0x45,0,20+len(ic),1,0,64,1,0)+me+gw; ih=ih[:10]+struct.pack('!H',csum(ih))+ih[12:]
s.send(gm+mac+b'\x08\0'+ih+ic)
while 1:
    f=s.recv(70000)
    if f[12:14]==b'\x08\0' and f[23]==1 and f[34]==0: break
print('pong')
