package dns

import (
	"context"
	"encoding/binary"
	"io"
	"net"
	"time"
)

// transferPatience is how long the next message of a zone transfer may take.
const transferPatience = 5 * time.Second

// transfer relays a zone transfer, the one kind of query whose answer has many
// messages (RFC 5936 §2.2, RFC 1995 §4), from the first upstream that gives
// one. The counting of c as in flight ends with it.
func (s *Server) transfer(q *query, c client) {
	ask := append([]byte(nil), q.msg...)
	s.stats.forwarded.Add(1)
	s.tasks.Go(func() {
		defer s.inFlight.Add(-1)
		var q query
		q.parse(ask)
		order, _ := s.upstreams.Load().order(nil, overTCP, s.now())
		for _, up := range order {
			if s.permit != nil && s.permit(up.addr) != nil {
				continue
			}
			if s.relayTransfer(up, &q, c) {
				c.tcp.finish()
				return
			}
		}
		s.stats.failed.Add(1)
		c.send(q.appendReply(nil, rcodeServFail, edeNoReachable))
	})
}

// relayTransfer relays what up answers to q, until up ends it or the last
// message is known to be there. It reports whether there was any.
func (s *Server) relayTransfer(up *upstream, q *query, c client) bool {
	ctx, cancel := context.WithTimeout(s.ctx, transferPatience)
	defer cancel()
	conn, err := s.connect(ctx, overTCP, up.addr)
	if err != nil {
		s.down(up, overTCP, s.now(), err)
		return false
	}
	defer conn.Close()
	defer context.AfterFunc(s.ctx, func() { conn.Close() })()
	id := s.ids.next()
	ask := string(q.msg[2:])
	conn.SetDeadline(time.Now().Add(transferPatience))
	frame := binary.BigEndian.AppendUint16(nil, uint16(len(q.msg)))
	frame = binary.BigEndian.AppendUint16(frame, id)
	if _, err := conn.Write(append(frame, ask...)); err != nil {
		return false
	}
	s.stats.upstreamQueries.Add(1)
	for sent, soas := false, 0; ; sent = true {
		msg, err := readMessage(conn)
		// Messages after the first may come without the question.
		if err != nil || len(msg) < headerLen || binary.BigEndian.Uint16(msg) != id ||
			!sent && !matches(msg, ask, q.end, id) {
			return sent
		}
		records, n := countSOA(msg, q)
		soas += n
		last := msg[3]&maskRcode != rcodeSuccess || soas == 0 ||
			q.qtype == typeAXFR && soas > 1 ||
			q.qtype == typeIXFR && !sent && records == 1 // nothing new
		if !c.tcp.more(c.id, msg) || last {
			return true
		}
		conn.SetDeadline(time.Now().Add(transferPatience))
	}
}

// countSOA returns how many records the answer section of msg has, and how many
// of them are SOA.
func countSOA(msg []byte, q *query) (records, soas int) {
	end := q.end
	if binary.BigEndian.Uint16(msg[4:]) == 0 {
		end = headerLen
	}
	if end > len(msg) {
		return 0, 0
	}
	for w := walkRecords(msg, end); w.next() && w.section == answer; {
		records++
		if w.typ == typeSOA {
			soas++
		}
	}
	return records, soas
}

// readMessage reads a message with its length in front. It takes memory for
// what has come, not for what was promised.
func readMessage(conn net.Conn) ([]byte, error) {
	var size [2]byte
	if _, err := io.ReadFull(conn, size[:]); err != nil {
		return nil, err
	}
	n := int(binary.BigEndian.Uint16(size[:]))
	msg, err := io.ReadAll(io.LimitReader(conn, int64(n)))
	if err == nil && len(msg) < n {
		err = io.ErrUnexpectedEOF
	}
	return msg, err
}
