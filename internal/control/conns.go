package control

import (
	"container/list"
	"net"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// maxConns is how many connections are open at a time.
const maxConns = 16

// conns is a listener that bounds the connections, and lets nobody in who has no
// business here.
type conns struct {
	*Listener
	admit func(*net.UnixConn) error

	mu      sync.Mutex // guards following
	open    *list.List // of *conn, those without a whole request longest first
	room    *sync.Cond // there may be room for one more
	done    bool
	refused int // those being told so
}

// conn is a connection of a client.
type conn struct {
	*net.UnixConn
	in   *conns
	at   *list.Element
	busy bool // a request is being answered; guarded by in.mu
}

func newConns(l *Listener, admit func(*net.UnixConn) error) *conns {
	c := &conns{Listener: l, admit: admit, open: list.New()}
	c.room = sync.NewCond(&c.mu)
	return c
}

// Accept implements net.Listener.
func (c *conns) Accept() (net.Conn, error) {
	for {
		uc, err := c.AcceptUnix()
		if err != nil {
			return nil, err
		}
		if err := c.admit(uc); err != nil {
			c.refuse(uc)
			time.Sleep(refusalPause)
			continue
		}
		if cn := c.add(uc); cn != nil {
			return cn, nil
		}
	}
}

// refuse tells a client that it has no business here, once it has asked: an
// answer that comes before the request breaks a client's connection instead of
// telling it anything.
func (c *conns) refuse(uc *net.UnixConn) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.refused == maxConns {
		uc.Close()
		return
	}
	c.refused++
	go func() {
		defer func() {
			uc.Close()
			c.mu.Lock()
			defer c.mu.Unlock()
			c.refused--
		}()
		const body = `{"error":{"code":"forbidden","message":"only the user of this network, from outside of it, may control it"}}` + "\n"
		uc.SetDeadline(time.Now().Add(refusalTime))
		buf := make([]byte, maxHeader)
		uc.Read(buf)
		uc.SetDeadline(time.Now().Add(refusalTime))
		uc.Write([]byte("HTTP/1.1 403 Forbidden\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n" + body))
		uc.CloseWrite()
		// To close at once would have the client fail to send the rest of its
		// request, and not read this.
		for {
			if _, err := uc.Read(buf); err != nil {
				return
			}
		}
	}()
}

// refusalTime is how long a client that is refused may take to ask, and then to
// read why.
const refusalTime = 200 * time.Millisecond

// refusalPause keeps a flood of those who are refused from taking the processor
// that carries the traffic.
const refusalPause = time.Millisecond

// add makes room for a connection, at the cost of the one that has been without
// a whole request the longest. If all are being answered it waits.
func (c *conns) add(uc *net.UnixConn) *conn {
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.open.Len() >= maxConns && !c.done {
		if victim := c.victim(); victim != nil {
			c.open.Remove(victim.at)
			victim.at = nil
			victim.UnixConn.Close() // its reader notices
			continue
		}
		c.room.Wait()
	}
	if c.done {
		uc.Close()
		return nil
	}
	cn := &conn{UnixConn: uc, in: c}
	cn.at = c.open.PushBack(cn)
	return cn
}

func (c *conns) victim() *conn {
	for e := c.open.Front(); e != nil; e = e.Next() {
		if cn := e.Value.(*conn); !cn.busy {
			return cn
		}
	}
	return nil
}

// Close implements net.Listener.
func (c *conns) Close() error {
	c.mu.Lock()
	c.done = true
	c.mu.Unlock()
	c.room.Broadcast()
	return c.Listener.Close()
}

// Close implements net.Conn.
func (cn *conn) Close() error {
	c := cn.in
	c.mu.Lock()
	if cn.at != nil {
		c.open.Remove(cn.at)
		cn.at = nil
		c.room.Signal()
	}
	c.mu.Unlock()
	return cn.UnixConn.Close()
}

// begin and finish enclose the answer to a request.
func (cn *conn) begin() { cn.in.mark(cn, true) }

func (cn *conn) finish() { cn.in.mark(cn, false) }

func (c *conns) mark(cn *conn, busy bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	cn.busy = busy
	if cn.at != nil && !busy {
		c.open.MoveToBack(cn.at)
		c.room.Signal()
	}
}

// peer returns who has connected.
func peer(c *net.UnixConn) (*unix.Ucred, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	var cred *unix.Ucred
	if cerr := raw.Control(func(fd uintptr) { cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); cerr != nil {
		return nil, cerr
	}
	return cred, err
}
