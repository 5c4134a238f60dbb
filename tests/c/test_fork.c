/*
 * test_fork.c - a process forks while other threads are inside an index.  Its child has the index,
 * but not the threads: it must find no lock taken, and no step half done.
 */
#define _POSIX_C_SOURCE 200809L
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"

enum { THREADS = 3, FORKS = 300, MANY = 2000, LATE = 60 };

static pb_index *indexes[2];
static atomic_bool over;

/* Takes and gives back so many at once that it is nearly always inside. */
static void *churn(void *number) {
    int me = *(int *)number;
    pb_index *index = indexes[me % 2], *ordinals = indexes[(me + 1) % 2];
    uint32_t mine[MANY], others[MANY];
    while (!over) {
        if (pb_plan_many(index, ordinals, MANY, mine, others) != MANY) abort();
        for (int i = 0; i < MANY; i++) {
            if (pb_index_release(index, mine[i]) < 0 || pb_index_release(ordinals, others[i]) < 0) abort();
        }
    }
    return NULL;
}

/*
 * What a child does with what it inherited; 0 when all is well.  One that waits for ever is ended
 * by SIGALRM.
 */
static int look(void) {
    static uint32_t taken[PB_CAPACITY_DEFAULT];
    alarm(LATE);
    for (int i = 0; i < 2; i++) {
        int64_t count = pb_index_count(indexes[i]);
        if (pb_index_list(indexes[i], 0, PB_CAPACITY_DEFAULT, taken) != count) return 1;
        uint32_t lowest = 0;
        while (lowest < count && taken[lowest] == lowest) lowest++;
        if (pb_index_acquire(indexes[i]) != lowest || pb_index_count(indexes[i]) != count + 1) return 2;
    }
    return pb_plan(indexes[0], indexes[1]) < 0 ? 3 : 0;
}

bool test_fork_beside_threads(void) {
    pthread_t threads[THREADS];
    int numbers[THREADS], wrong = 0;
    over = false;
    for (int i = 0; i < 2; i++) indexes[i] = pb_index_new(PB_CAPACITY_DEFAULT);
    for (int i = 0; i < THREADS; i++) {
        numbers[i] = i;
        CHECK(pthread_create(&threads[i], NULL, churn, &numbers[i]) == 0);
    }
    for (int i = 0; i < FORKS && wrong == 0; i++) {
        pid_t child = fork();
        if (child == 0) _exit(look());
        int status;
        if (child < 0 || waitpid(child, &status, 0) != child) {
            wrong = -1;
        } else {
            wrong = status;
        }
    }
    over = true;
    for (int i = 0; i < THREADS; i++) pthread_join(threads[i], NULL);
    if (wrong != 0) fprintf(stderr, "a child ended with wait status %#x (0xe: it waited for ever)\n", (unsigned)wrong);
    CHECK(wrong == 0);
    CHECK(pb_index_count(indexes[0]) == 0 && pb_index_count(indexes[1]) == 0);
    for (int i = 0; i < 2; i++) pb_index_free(indexes[i]);
    return true;
}

/* The process that forks goes on with its locks as they were. */
bool test_fork_leaves_the_parent(void) {
    pb_index *index = pb_index_new(PB_CAPACITY_DEFAULT);
    CHECK(pb_index_acquire(index) == 0);
    pid_t child = fork();
    if (child == 0) _exit(pb_index_acquire(index) == 1 && pb_index_release(index, 0) == 0 ? 0 : 1);
    int status = -1;
    CHECK(child > 0 && waitpid(child, &status, 0) == child && status == 0);
    CHECK(pb_index_acquire(index) == 1 && pb_index_count(index) == 2);
    pb_index_free(index);
    return true;
}
