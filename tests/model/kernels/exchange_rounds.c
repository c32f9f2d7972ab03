/* Two processes exchange slots in shared memory by the protocol of parallel/shared_memory.py, with the words of `kernels.h`: each writes its
   slot and then its sequence number, waits for the other's, and reads the other's slot. Prints the number of slots that were not whole. */
#include "kernels.h"

#include <sched.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

enum { ROUNDS = 20000, WORDS = 64 };

typedef struct {
    int64_t sequence[2][8];
    int64_t slots[2][2][WORDS]; /* [buffer][process] */
} Shared;

static int exchange(Shared *shared, int me) {
    int wrong = 0;
    for (int64_t round = 1; round <= ROUNDS; round++) {
        for (int i = 0; i < WORDS; i++) shared->slots[round % 2][me][i] = round * WORDS + i;
        tandem_store_word(shared->sequence[me], round);
        while (tandem_load_word(shared->sequence[1 - me]) < round) sched_yield();
        for (int i = 0; i < WORDS; i++) wrong += shared->slots[round % 2][1 - me][i] != round * WORDS + i;
    }
    return wrong;
}

int main(void) {
    Shared *shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    pid_t child = fork();
    if (child == 0) _exit(exchange(shared, 1) != 0);
    int wrong = exchange(shared, 0), status;
    waitpid(child, &status, 0);
    printf("%d %d\n", wrong, WEXITSTATUS(status));
    return 0;
}
