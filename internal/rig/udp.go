package rig

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// A UDPEcho sends datagrams of these sizes, one after another, to an echo
// server and compares what comes back.
type UDPEcho struct {
	Addr  string
	Sizes []int
	Tries int           // per size; 0 means 3
	Wait  time.Duration // per try; 0 means 2 s
}

// EchoUDP runs a UDPEcho in a node; the strings name the sizes that failed.
var EchoUDP = NewFunc("rig.echoUDP", func(_ context.Context, r UDPEcho) ([]string, error) {
	c, err := net.Dial("udp", r.Addr)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	c.(*net.UDPConn).SetReadBuffer(1 << 20)
	if r.Tries == 0 {
		r.Tries = 3
	}
	if r.Wait == 0 {
		r.Wait = 2 * time.Second
	}
	var failed []string
	for _, size := range r.Sizes {
		if len(failed) == 4 {
			return append(failed, "…"), nil
		}
		if err := echoOne(c, size, r); err != nil {
			failed = append(failed, fmt.Sprintf("%d bytes: %v", size, err))
		}
	}
	return failed, nil
}).Within(2 * time.Minute)

func echoOne(c net.Conn, size int, r UDPEcho) error {
	want := make([]byte, size)
	newRandom(uint64(size)).Read(want)
	got := make([]byte, 65536)
	var last error
	for range r.Tries {
		if _, err := c.Write(want); err != nil {
			last = err
			continue
		}
		c.SetReadDeadline(time.Now().Add(r.Wait))
		for {
			n, err := c.Read(got)
			if err != nil {
				last = err
				break
			}
			if bytes.Equal(got[:n], want) {
				return nil
			}
			if n == size {
				return errors.New("came back changed")
			}
			// A late answer to an earlier size: read on.
		}
	}
	return last
}

// A UDPMapping asks several servers, from one socket, who asks.
type UDPMapping struct {
	Source string // local address; its port may be 0
	Addrs  []string
}

// MapUDP runs a UDPMapping in a node: what each server saw.
var MapUDP = NewFunc("rig.mapUDP", func(_ context.Context, r UDPMapping) ([]string, error) {
	source, err := net.ResolveUDPAddr("udp", r.Source)
	if err != nil {
		return nil, err
	}
	c, err := net.ListenUDP("udp", source)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	seen := make([]string, len(r.Addrs))
	b := make([]byte, 2048)
	for i, addr := range r.Addrs {
		to, err := net.ResolveUDPAddr("udp", addr)
		if err != nil {
			return nil, err
		}
		for try := 0; try < 3 && seen[i] == ""; try++ {
			if _, err := c.WriteTo(nil, to); err != nil { // an empty datagram
				return nil, err
			}
			c.SetReadDeadline(time.Now().Add(time.Second))
			n, from, err := c.ReadFromUDP(b)
			if err == nil && from.IP.Equal(to.IP) && from.Port == to.Port {
				seen[i] = string(b[:n])
			}
		}
	}
	return seen, nil
})

// A UDPBurst has many sockets send to an echo server at the same time.
type UDPBurst struct {
	Addr    string
	Sockets int
	Each    int // datagrams per socket, one after another
	Size    int
}

// BurstUDP runs a UDPBurst in a node: how many datagrams came back.
var BurstUDP = NewFunc("rig.burstUDP", func(_ context.Context, r UDPBurst) (int, error) {
	var back atomic.Int64
	var wg sync.WaitGroup
	for range r.Sockets {
		wg.Go(func() {
			c, err := net.Dial("udp", r.Addr)
			if err != nil {
				return
			}
			defer c.Close()
			b := make([]byte, max(r.Size, 1))
			for range r.Each {
				c.Write(b[:r.Size])
				c.SetReadDeadline(time.Now().Add(3 * time.Second))
				if n, err := c.Read(b); err == nil && n == r.Size {
					back.Add(1)
				}
			}
		})
	}
	wg.Wait()
	return int(back.Load()), nil
}).Within(2 * time.Minute)
