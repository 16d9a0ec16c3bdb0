package forwarder

// mover is a flow that has something to move.
type mover interface {
	// pump moves what can be moved in one turn, asks for another where there
	// is more, and returns how many bytes it was.
	pump() int
}

// fifo is a queue of flows in a ring that grows as needed.
type fifo struct {
	ring []mover // length a power of two
	head int
	n    int
}

func (q *fifo) push(fl mover) {
	if q.n == len(q.ring) {
		bigger := make([]mover, max(64, 2*len(q.ring)))
		for i := range q.n {
			bigger[i] = q.ring[(q.head+i)&(len(q.ring)-1)]
		}
		q.ring, q.head = bigger, 0
	}
	q.ring[(q.head+q.n)&(len(q.ring)-1)] = fl
	q.n++
}

// pop returns the flow that waited longest, nil if there is none.
func (q *fifo) pop() mover {
	if q.n == 0 {
		return nil
	}
	fl := q.ring[q.head]
	q.ring[q.head] = nil
	q.head = (q.head + 1) & (len(q.ring) - 1)
	q.n--
	return fl
}
