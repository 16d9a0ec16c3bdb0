package forwarder_test

import (
	"bytes"
	"net"
	"testing"
	"time"
)

func udpEcho(t testing.TB, network, addr string) uint16 {
	t.Helper()
	pc, err := net.ListenPacket(network, addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { pc.Close() })
	go func() {
		b := make([]byte, 1<<16)
		for {
			n, from, err := pc.ReadFrom(b)
			if err != nil {
				return
			}
			pc.WriteTo(b[:n], from)
		}
	}()
	return uint16(pc.LocalAddr().(*net.UDPAddr).Port)
}

func TestUDPCarriesEverySize(t *testing.T) {
	port4 := udpEcho(t, "udp4", "127.0.0.1:0")
	port6 := udpEcho(t, "udp6", "[::1]:0")
	for _, v := range variants {
		if v.opt.bad {
			continue // datagrams may get lost
		}
		t.Run(v.name, func(t *testing.T) {
			n := newNetwork(t, v.opt)
			var sum uint64
			for _, c := range []net.Conn{n.dialUDP(at(gateway4, port4)), n.dialUDP(at(gateway6, port6))} {
				for _, size := range []int{0, 1, 99, 100, 101, 1472, 1473, 4096, 5000, 20000, 65000, 65507} {
					b := bytes.Repeat([]byte{byte(size)}, size)
					if size > 0 {
						b[size-1] = 'z'
					}
					if _, err := c.Write(b); err != nil {
						t.Fatalf("write %d: %v", size, err)
					}
					got := make([]byte, 1<<16)
					c.SetReadDeadline(time.Now().Add(20 * time.Second))
					k, err := c.Read(got)
					if err != nil || !bytes.Equal(got[:k], b) {
						t.Errorf("%v: %d bytes came back as %d, %v", c.RemoteAddr(), size, k, err)
					}
					sum += uint64(size)
				}
			}
			if s := n.fwd.Stats(); s.UDPBytesUp.Load() != sum || s.UDPBytesDown.Load() != sum {
				t.Errorf("%d bytes up and %d down are counted, want %d", s.UDPBytesUp.Load(), s.UDPBytesDown.Load(), sum)
			}
		})
	}
}

func TestUDPRefusalReachesTheGuest(t *testing.T) {
	pc, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := uint16(pc.LocalAddr().(*net.UDPAddr).Port)
	pc.Close()
	n := newNetwork(t, rigOptions{policy: open})
	c := n.dialUDP(at(gateway4, port))
	var err2 error
	for deadline := time.Now().Add(20 * time.Second); err2 == nil && time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		_, err2 = c.Write([]byte("x"))
	}
	if err2 == nil || !bytes.Contains([]byte(err2.Error()), []byte("refused")) {
		t.Errorf("write after a refusal: %v, want connection refused", err2)
	}
}

func TestUDPBurstKeepsBoundaries(t *testing.T) {
	port := udpEcho(t, "udp4", "127.0.0.1:0")
	n := newNetwork(t, rigOptions{policy: open, offload: true})
	c := n.dialUDP(at(gateway4, port))
	sizes := []int{300, 300, 300, 200, 300, 0, 5, 5, 5, 6, 1400, 1400, 1400, 1}
	for _, s := range sizes {
		c.Write(bytes.Repeat([]byte{'a'}, s))
	}
	got := make([]byte, 1<<16)
	for i, s := range sizes {
		c.SetReadDeadline(time.Now().Add(20 * time.Second))
		k, err := c.Read(got)
		if err != nil || k != s {
			t.Fatalf("datagram %d: %d bytes, %v; want %d", i, k, err, s)
		}
	}
}
