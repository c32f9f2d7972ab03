/* One product of activations and an int8 weight, as int8_linear.c prepares it. */
#ifndef TANDEM_INT8_PRODUCT_H
#define TANDEM_INT8_PRODUCT_H

#include "slices.h"

typedef struct {
    const int8_t *slices;    /* [tokens][num_slices][padded columns], zero-padded */
    const int32_t *sums;     /* [tokens][num_slices][groups]: the sum of a slice's elements in a group */
    const float *row_scale;  /* [tokens] */
    size_t padded;
    const int8_t *weight;    /* [rows][columns] */
    const float *scale;      /* [rows][groups] */
    const int64_t *starts;   /* [groups + 1]: first column of each group */
    size_t columns, groups, num_slices;
    void *out;               /* [tokens][out_stride] */
    size_t out_stride;
    int out_dtype;
    const float *correction; /* [rows] or NULL */
    int alone;               /* whether one tile covers all slices */
} Product;

/* The product for many slices, see int8_panels.c. Returns 0, or 1 when out of memory. */
int multiply_in_panels(const Product *p, size_t total, size_t rows, int threads);

#endif
