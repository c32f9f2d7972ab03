/* AMX with int8 tiles: the panels of int8_panels.c in products of 16 slices by 16 rows by 64 columns. See README.md.

   With EMULATED_TILES the same code runs on plain C tiles, so that its arithmetic can be tested on a CPU without AMX. */
enum { PANEL_COLUMNS = 4, PANEL_LINES = 16, PACKED_COLUMNS = 64, PANEL_OFFSET = 0, PANEL_SLICES = 32, PANELS_AT_ONCE = 2, FEWEST_PANEL_SLICES = 32 };

/* Tiles 0 to 3: sums of two times 16 slices by two panels; 4 and 5: slices; 6 and 7: lines of two panels. */
#ifdef EMULATED_TILES
static _Thread_local union { int8_t bytes[16][64]; int32_t words[16][16]; } tile[8];

INLINE void open_panels(void) {}
INLINE void close_panels(void) {}
#define clear_tile(number) memset(&tile[number], 0, sizeof tile[number])
#define load_tile(number, from, stride) \
    for (size_t row = 0; row < 16; row++) memcpy(tile[number].bytes[row], (const char *)(from) + row * (stride), 64)
#define store_tile(number, to, stride) \
    for (size_t row = 0; row < 16; row++) memcpy((char *)(to) + row * (stride), tile[number].bytes[row], 64)
/* As Intel describes tdpbssd. */
INLINE void add_tiles(int sum, int left, int right) {
    for (size_t row = 0; row < 16; row++)
        for (size_t k = 0; k < 16; k++)
            for (size_t column = 0; column < 16; column++)
                for (size_t i = 0; i < 4; i++)
                    tile[sum].words[row][column] += (int32_t)tile[left].bytes[row][4 * k + i] * tile[right].bytes[k][4 * column + i];
}
#else
/* Inline assembly, since the intrinsics of GCC 12 do not tell it that they read and write memory. */
INLINE void open_panels(void) {
    struct { uint8_t palette, start, none[14]; uint16_t row_bytes[16]; uint8_t rows[16]; } __attribute__((packed)) shape = {.palette = 1};
    for (int i = 0; i < 8; i++) shape.row_bytes[i] = 64, shape.rows[i] = 16;
    __asm__ volatile("ldtilecfg %0" : : "m"(shape));
}
INLINE void close_panels(void) { __asm__ volatile("tilerelease" : : : "memory"); }
#define clear_tile(number) __asm__ volatile("tilezero %%tmm" #number : : )
#define load_tile(number, from, stride) \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #number : : "r"((const void *)(from)), "r"((size_t)(stride)) : "memory")
#define store_tile(number, to, stride) \
    __asm__ volatile("tilestored %%tmm" #number ", (%0,%1,1)" : : "r"((void *)(to)), "r"((size_t)(stride)) : "memory")
#define add_tiles(sum, left, right) __asm__ volatile("tdpbssd %%tmm" #right ", %%tmm" #left ", %%tmm" #sum : : )
#endif

INLINE void multiply_lines(ints sums[PANELS_AT_ONCE][PANEL_SLICES], const size_t count, const uint8_t *const panel[PANELS_AT_ONCE],
                           const panel_slice *slice, size_t stride, size_t lines) {
    clear_tile(0);
    clear_tile(1);
    clear_tile(2);
    clear_tile(3);
    for (size_t line = 0; line < lines; line += 16) {
        load_tile(6, panel[0] + line * 64, 64);
        load_tile(7, panel[1] + line * 64, 64);
        load_tile(4, slice + line * 4, stride);
        add_tiles(0, 4, 6);
        add_tiles(1, 4, 7);
        if (count <= 16) continue;
        load_tile(5, slice + 16 * stride + line * 4, stride);
        add_tiles(2, 5, 6);
        add_tiles(3, 5, 7);
    }
    store_tile(0, &sums[0][0], 64);
    store_tile(1, &sums[1][0], 64);
    if (count <= 16) return;
    store_tile(2, &sums[0][16], 64);
    store_tile(3, &sums[1][16], 64);
}
