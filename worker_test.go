package usernet

import (
	"slices"
	"sync/atomic"
	"testing"
	"time"
)

// TestTellLast: of what comes while something is being told, only the last is told,
// after that, and nobody waits.
func TestTellLast(t *testing.T) {
	go1, told := make(chan struct{}), make(chan int, 10)
	var at atomic.Int32
	tell := tellLast(func(n int) {
		if at.Add(1) > 1 {
			t.Error("two are told at the same time")
		}
		<-go1
		told <- n
		at.Add(-1)
	})
	tell(0)
	for at.Load() == 0 {
		time.Sleep(time.Millisecond)
	}
	for n := range 1000 {
		tell(n)
	}
	close(go1)
	if got := []int{<-told, <-told}; !slices.Equal(got, []int{0, 999}) {
		t.Errorf("told %v, want the first and the last", got)
	}
	tell(7)
	if got := <-told; got != 7 {
		t.Errorf("told %d, want 7", got)
	}
}
