// Package rights passes descriptors beside messages on unix sockets (unix(7),
// SCM_RIGHTS).
package rights

import "golang.org/x/sys/unix"

// Space is how large the buffer for the control messages of up to n descriptors
// has to be.
func Space(n int) int { return unix.CmsgSpace(4 * n) }

// Encode returns the control message that has copies of fds beside a message, nil
// if there are none.
func Encode(fds []int) []byte {
	if len(fds) == 0 {
		return nil
	}
	return unix.UnixRights(fds...)
}

// Decode takes the descriptors, which are the caller's, out of control messages.
// With an error there are none.
func Decode(control []byte) ([]int, error) {
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil {
		return nil, err
	}
	var fds []int
	for i := range messages {
		if messages[i].Header.Type != unix.SCM_RIGHTS {
			continue
		}
		more, err := unix.ParseUnixRights(&messages[i])
		if err != nil {
			Close(fds)
			return nil, err
		}
		fds = append(fds, more...)
	}
	return fds, nil
}

// Close closes descriptors.
func Close(fds []int) {
	for _, fd := range fds {
		unix.Close(fd)
	}
}
