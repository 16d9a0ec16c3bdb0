// Package control serves and asks the control API of a network on a unix socket.
//
// # Who may ask
//
// The socket is the user's alone (mode 0600), and the peer's uid is asked of the
// kernel as well. A guest may share the user's files and uid, as that of
// `usernet run` does: whoever is in the network's own namespace, or in a user
// namespace below its owner, is refused, too.
//
// # What one client can do to others
//
// Up to [maxConns] connections are open at a time. One more takes the place of
// the one that has been without a whole request the longest, so that clients
// that say nothing, or that slowly, lock nobody out. A request has to arrive and
// its answer to be read within a few seconds. Nothing here takes a lock that
// traffic needs.
package control
