/* All decoder layers in one call: with few tokens, the overhead between two kernels costs as much as a kernel.

   The steps are those of `LlamaForCausalLM._run_layer`, and the gathers those of `SharedMemoryCollectives`: each rank writes its slot,
   increments its sequence number, and reads all slots once all numbers have arrived. Progress lines are updated as in
   WatchedCollectives. */
#define _GNU_SOURCE
#include "kernels.h"
#include "vectors.h"

#include <sched.h>
#include <string.h>
#include <time.h>

enum { SPINS_BEFORE_YIELD = 64, SPINS_BETWEEN_CHECKS = 2000, SPINS_BEFORE_SLEEP = 50000, SLEEP_NANOSECONDS = 200000 };

typedef struct {
    const void *weight;
    const float *scale;    /* NULL: the weight has the type of the activations */
    const int64_t *starts;
    const int8_t *zeros;   /* NULL: the weight is not packed in 4 bits */
    size_t groups, columns, rows;
    Inputs inputs;
} Linear;

typedef struct {
    const void *input_norm, *post_norm;
    Linear qkv, o, gate_up, down;
    const float *fixed_scales;
    size_t window;         /* as for tandem_attend */
} Layer;

typedef struct {
    size_t rank, world_size;
    int64_t *flags;        /* [world_size][flag_words]: the first word is a rank's sequence number */
    size_t flag_words;
    char *slots;           /* [2][world_size][slot_bytes] */
    size_t slot_bytes;
    int64_t sequence;
    int (*check)(void);    /* checks the peers; nonzero: one is gone */
    int64_t *beats, *operation, *entered, *gathered; /* of this rank's progress line; the last one in nanoseconds */
    int64_t gathering, computing;         /* operation codes */
} Ranks;

typedef struct {
    int dtype;
    size_t tokens, hidden_size, heads, kv_heads, head_dim;
    float epsilon;
    const float *cosine, *sine;
    char *cache;           /* of the first layer; layers are cache_stride bytes apart */
    size_t cache_stride;
    float *token_scales;   /* stride in floats; NULL: none */
    size_t scales_stride;
    size_t block_size;
    const int64_t *spans;
    size_t num_spans;
    const int64_t *blocks;
    const int64_t *query_widths, *hidden_widths, *inner_widths; /* [world_size]: columns of each rank */
    char *hidden, *delta, *x, *qkv, *local, *whole, *gate_up;   /* work space; local and whole have the size of the widest use */
    int has_delta, threads;
} Pass;

/* What the gathers of Python read and write; documented in parallel/shared_memory.py. */
int64_t tandem_load_word(const int64_t *word) { return __atomic_load_n(word, __ATOMIC_ACQUIRE); }
void tandem_store_word(int64_t *word, int64_t value) { __atomic_store_n(word, value, __ATOMIC_RELEASE); }

static int wait_for_peers(Ranks *r) {
    for (size_t peer = 0; peer < r->world_size; peer++) {
        int64_t *flag = r->flags + peer * r->flag_words;
        for (size_t spins = 0; tandem_load_word(flag) < r->sequence; spins++) {
            if (spins < SPINS_BEFORE_YIELD) {
                relax();
                continue;
            }
            sched_yield();
            if (spins % SPINS_BETWEEN_CHECKS == 0 && r->check()) return 1;
            if (spins > SPINS_BEFORE_SLEEP) nanosleep(&(struct timespec){0, SLEEP_NANOSECONDS}, NULL);
        }
    }
    return 0;
}

static int64_t read_clock(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

/* out [rows, sum of widths] = [rows, widths[rank]] of every rank, concatenated by column. */
static int gather(Ranks *r, const char *local, size_t rows, const int64_t *widths, size_t item, char *out) {
    size_t widest = 1, total = 0, mine = widths[r->rank] * item;
    for (size_t peer = 0; peer < r->world_size; peer++) {
        if ((size_t)widths[peer] * item > widest) widest = widths[peer] * item;
        total += widths[peer] * item;
    }
    size_t rows_a_round = r->slot_bytes / widest;
    int64_t started = read_clock();
    ++*r->entered;
    *r->operation = r->gathering;
    ++*r->beats;
    for (size_t first = 0; first < rows; first += rows_a_round) {
        size_t count = smaller(rows_a_round, rows - first);
        char *slots = r->slots + (++r->sequence % 2) * r->world_size * r->slot_bytes;
        memcpy(slots + r->rank * r->slot_bytes, local + first * mine, count * mine);
        tandem_store_word(r->flags + r->rank * r->flag_words, r->sequence);
        if (wait_for_peers(r)) return 1;
        size_t column = 0;
        for (size_t peer = 0; peer < r->world_size; peer++) {
            size_t width = widths[peer] * item;
            for (size_t row = 0; row < count; row++)
                memcpy(out + (first + row) * total + column, slots + peer * r->slot_bytes + row * width, width);
            column += width;
        }
    }
    *r->gathered += read_clock() - started;
    *r->operation = r->computing;
    ++*r->beats;
    return 0;
}

static int apply(const Pass *p, const Linear *l, const char *x, char *out) {
    if (l->zeros)
        return tandem_int4_linear(x, p->dtype, p->tokens, l->columns, l->weight, l->rows, l->scale, l->zeros, l->starts, l->groups,
                                  &l->inputs, out, p->dtype, l->rows, p->threads);
    if (l->scale)
        return tandem_int8_linear(x, p->dtype, p->tokens, l->columns, l->weight, l->rows, l->scale, l->starts, l->groups, &l->inputs,
                                  out, p->dtype, l->rows, p->threads);
    tandem_float_linear(x, p->dtype, p->tokens, l->columns, l->weight, l->rows, out, l->rows, p->threads);
    return 0;
}

/* Gather `local` of every rank into `whole`; with one rank, `local` is used directly. Returns the result, or NULL when a peer is gone. */
static char *join(const Pass *p, Ranks *r, char *local, const int64_t *widths, char *whole) {
    if (r->world_size == 1) return local;
    return gather(r, local, p->tokens, widths, item_bytes(p->dtype), whole) ? NULL : whole;
}

/* Run layers [first, first + count) on p->hidden; the last delta, not yet added, is left in p->delta. Returns 0; 1: out of memory; 2: a
   peer is gone. */
int tandem_layers(const Layer *layers, size_t first, size_t count, Pass *p, Ranks *r) {
    for (size_t index = first; index < first + count; index++) {
        const Layer *l = layers + index;
        char *delta = p->has_delta ? p->delta : NULL, *from;
        tandem_rms_norm(p->hidden, delta, l->input_norm, p->x, p->dtype, p->tokens, p->hidden_size, p->epsilon, p->threads);
        if (apply(p, &l->qkv, p->x, p->qkv)) return 1;
        if (tandem_attend(p->qkv, p->dtype, p->tokens, p->heads, p->kv_heads, p->head_dim, p->cosine, p->sine, p->cache + index * p->cache_stride,
                          p->token_scales ? p->token_scales + index * p->scales_stride : NULL, l->fixed_scales, p->block_size, p->spans,
                          p->num_spans, p->blocks, l->window, 0, p->local, p->threads))
            return 1;
        if (!(from = join(p, r, p->local, p->query_widths, p->whole))) return 2;
        if (apply(p, &l->o, from, r->world_size == 1 ? p->delta : p->local)) return 1;
        if (!join(p, r, r->world_size == 1 ? p->delta : p->local, p->hidden_widths, p->delta)) return 2;
        tandem_rms_norm(p->hidden, p->delta, l->post_norm, p->x, p->dtype, p->tokens, p->hidden_size, p->epsilon, p->threads);
        if (apply(p, &l->gate_up, p->x, p->gate_up)) return 1;
        tandem_silu_multiply(p->gate_up, p->local, p->dtype, p->tokens, p->inner_widths[r->rank], p->threads);
        if (!(from = join(p, r, p->local, p->inner_widths, p->whole))) return 2;
        if (apply(p, &l->down, from, r->world_size == 1 ? p->delta : p->local)) return 1;
        if (!join(p, r, r->world_size == 1 ? p->delta : p->local, p->hidden_widths, p->delta)) return 2;
        p->has_delta = 1;
    }
    return 0;
}
