// Package hub is where the processes of one network of several containers meet: its directory, lock, socket and messages.
package hub
