package main

import (
	"context"
	"time"
)

// startJob measures how long a subject takes until its guest can go.
func startJob(opts options) job {
	// 20 starts over all rounds.
	n := pick(opts.Quick, 5, (20+opts.Rounds-1)/opts.Rounds)
	return job{
		name: "start", how: "exec until ready", seconds: 0.4 * float64(n),
		alone: func(ctx context.Context, b *bench, name string) (samples, error) {
			s := samples{}
			for range n {
				in, err := b.start(ctx, name, 65520)
				if err != nil {
					return s, err
				}
				in.stop()
				s["start"] = append(s["start"], float64(in.took.Microseconds())/1000)
			}
			return s, nil
		},
	}
}

const (
	fewFlows    = 100  // whose memory is not counted
	idleFlows   = 1000 // while CPU time is watched
	memoryFlows = 2000 // when memory is read
	settle      = 2 * time.Second
)

// idleJob measures what a subject costs while nothing happens.
func idleJob(opts options) job {
	watch := pick(opts.Quick, 3*time.Second, 10*time.Second)
	return job{
		name: "idle", how: "memory and CPU with idle flows", rounds: 2, seconds: watch.Seconds() + 3.25*settle.Seconds() + 1,
		alone: func(ctx context.Context, b *bench, name string) (samples, error) {
			in, err := b.start(ctx, name, 65520)
			if err != nil {
				return nil, err
			}
			defer in.stop()
			return b.idle(ctx, in, watch)
		},
	}
}

func (b *bench) idle(ctx context.Context, in *instance, watch time.Duration) (samples, error) {
	s := samples{}
	if err := sleep(ctx, settle/2); err != nil {
		return s, err
	}
	empty, err := pss(in.pid)
	if err != nil {
		return s, err
	}
	s["memory"] = []float64{float64(empty) / 1e6}

	// What the first flows bring in for all is not theirs.
	few, err := b.startLoad(ctx, in, flowEcho, fewFlows, 0)
	if err != nil {
		return s, err
	}
	defer few.kill()
	if err := sleep(ctx, settle/4); err != nil {
		return s, err
	}
	base, err := pss(in.pid)
	if err != nil {
		return s, err
	}
	first, err := b.startLoad(ctx, in, flowEcho, idleFlows-fewFlows, 0)
	if err != nil {
		return s, err
	}
	defer first.kill()
	if err := sleep(ctx, settle); err != nil {
		return s, err
	}
	before, err := fineCPUTime(in.pid)
	if err != nil {
		return s, err
	}
	if err := sleep(ctx, watch); err != nil {
		return s, err
	}
	after, err := fineCPUTime(in.pid)
	if err != nil {
		return s, err
	}
	s["idle-cpu"] = []float64{100 * (after - before).Seconds() / watch.Seconds()}

	second, err := b.startLoad(ctx, in, flowEcho, memoryFlows-idleFlows, 0)
	if err != nil {
		return s, err
	}
	defer second.kill()
	if err := sleep(ctx, settle); err != nil {
		return s, err
	}
	full, err := pss(in.pid)
	if err != nil {
		return s, err
	}
	s["flow-memory"] = []float64{float64(full-base) / (memoryFlows - fewFlows) / 1024}
	return s, nil
}

// sleep waits, unless the run is interrupted.
func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}
