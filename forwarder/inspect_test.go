package forwarder_test

import (
	"context"
	"errors"
	"io"
	"net"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/usernet/usernet/forwarder"
)

func flows(t *testing.T, n *network) []forwarder.Flow {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	list, err := n.fwd.Flows(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return list
}

// TestFlowsAreListed: who talks to whom, and how much they have said.
func TestFlowsAreListed(t *testing.T) {
	n := newNetwork(t, rigOptions{policy: open})
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	accepted := make(chan net.Conn, 1)
	go func() {
		c, err := l.Accept()
		if err == nil {
			accepted <- c
		}
	}()
	port := uint16(l.Addr().(*net.TCPAddr).Port)
	c, err := n.dial(at(gateway4, port))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	server := <-accepted
	defer server.Close()
	c.Write([]byte("seven b"))
	server.Write([]byte("three"))
	io.ReadFull(c, make([]byte, 5))
	io.ReadFull(server, make([]byte, 7))

	echo := udpEcho(t, "udp4", "127.0.0.1:0")
	u := n.dialUDP(at(gateway4, echo))
	defer u.Close()
	u.Write([]byte("1234"))
	u.SetReadDeadline(time.Now().Add(30 * time.Second))
	if _, err := u.Read(make([]byte, 9)); err != nil {
		t.Fatal(err)
	}

	want := []forwarder.Flow{
		{Proto: forwarder.TCP, Remote: at(gateway4, port), Up: 7, Down: 5, State: forwarder.StateEstablished},
		{Proto: forwarder.UDP, Remote: at(gateway4, echo), Up: 4, Down: 4, State: forwarder.StateActive},
	}
	got := flows(t, n)
	if diff := cmp.Diff(want, got, cmpopts.IgnoreFields(forwarder.Flow{}, "ID", "Guest", "Dialled", "Age", "Idle"),
		cmpopts.EquateComparable(want[0].Remote)); diff != "" {
		t.Fatalf("flows (-want +got):\n%s", diff)
	}
	for _, f := range got {
		if f.Guest.Addr() != guest4 || f.Dialled.Addr().String() != "127.0.0.1" || f.Dialled.Port() != f.Remote.Port() {
			t.Errorf("flow %+v: wrong ends", f)
		}
		if f.Age < f.Idle || f.Age > 10*time.Second {
			t.Errorf("flow %+v: wrong times", f)
		}
		id, ok := forwarder.ParseFlowID(forwarder.FlowID(f.ID))
		if !ok || id != f.ID {
			t.Errorf("id %x reads back as %x", f.ID, id)
		}
	}

	// Half-closed shows.
	c.CloseWrite()
	io.Copy(io.Discard, server)
	if got := flows(t, n)[0].State; got != forwarder.StateGuestClosed {
		t.Errorf("after the guest's FIN the state is %s", got)
	}
}

// TestKillFlow: both ends get a reset, others nothing.
func TestKillFlow(t *testing.T) {
	n := newNetwork(t, rigOptions{policy: open})
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	port := uint16(l.Addr().(*net.TCPAddr).Port)
	var ends [2][2]net.Conn
	for i := range ends {
		if ends[i][0], err = n.dial(at(gateway4, port)); err != nil {
			t.Fatal(err)
		}
		if ends[i][1], err = l.Accept(); err != nil {
			t.Fatal(err)
		}
		defer ends[i][0].Close()
		defer ends[i][1].Close()
	}
	list := flows(t, n)
	if len(list) != 2 {
		t.Fatalf("%d flows, want 2", len(list))
	}
	ctx := context.Background()
	if err := n.fwd.KillFlow(ctx, list[0].ID); err != nil {
		t.Fatal(err)
	}
	for side, c := range ends[0] {
		c.SetReadDeadline(time.Now().Add(30 * time.Second))
		_, err := c.Read(make([]byte, 1))
		if side == 1 && !errors.Is(err, syscall.ECONNRESET) || err == nil || errors.Is(err, io.EOF) {
			t.Errorf("side %d of the killed flow reads %v, want a reset", side, err)
		}
	}
	ends[1][0].Write([]byte("x"))
	ends[1][1].SetReadDeadline(time.Now().Add(30 * time.Second))
	if _, err := ends[1][1].Read(make([]byte, 1)); err != nil {
		t.Errorf("the other flow: %v", err)
	}
	// Its id means nothing any more, not even when its slot has a successor.
	again, err := n.dial(at(gateway4, port))
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	for _, id := range []uint64{list[0].ID, 1 << 40, ^uint64(0), 0} {
		if err := n.fwd.KillFlow(ctx, id); !errors.Is(err, forwarder.ErrNoFlow) {
			t.Errorf("kill %x: %v, want ErrNoFlow", id, err)
		}
	}
	if got := flows(t, n); len(got) != 2 {
		t.Errorf("%d flows are left, want 2", len(got))
	}
}

// TestDo: what is given to the engine is called or refused, never forgotten.
func TestDo(t *testing.T) {
	n := newNetwork(t, rigOptions{policy: open})
	ran := 0
	for range 1000 {
		if err := n.fwd.Do(context.Background(), func() { ran++ }); err != nil {
			t.Fatal(err)
		}
	}
	if ran != 1000 {
		t.Errorf("%d calls, want 1000", ran)
	}
	done, cancel := context.WithCancel(context.Background())
	cancel()
	for range 100 {
		called := false
		if err := n.fwd.Do(done, func() { called = true }); (err == nil) != called {
			t.Fatalf("called is %v, error %v", called, err)
		}
	}
}

func TestParseFlowID(t *testing.T) {
	for _, bad := range []string{"", "-1", "0x1", "G", "FF", "00", "1 ", "11112222333344445"} {
		if id, ok := forwarder.ParseFlowID(bad); ok {
			t.Errorf("%q is taken as %x", bad, id)
		}
	}
}
