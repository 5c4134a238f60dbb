"""The storm: processes that share one store attach and detach on real QEMUs, and are killed at
random; what is left must always be right.

    PYTHONPATH=tests python -m storm --seconds 600 --seed 1

`weather` is the parent: it starts, stops and kills the processes (`running`) and the machines
(`sky`). `life` is a process that is killed. It writes `notes` into a pipe before and after each
call; `book` knows from them what a sandbox may hold, `witness` asks QEMU and the store, and `judge`
says what is wrong. `hog` takes the store's lock now and then.
"""
