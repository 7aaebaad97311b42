/* One AMX dot product, in the compiler's own encoding: c[m][n] += the dot product of a[m] and b's column n.
 *
 * config: the 64 bytes of LDTILECFG; tile 0 is c, tile 1 a, tile 2 b. Strides are in bytes.
 */
#include <immintrin.h>

#define DOT(name)                                                                          \
    void name(const void *config, void *c, long c_stride, const void *a, long a_stride,    \
              const void *b, long b_stride) {                                              \
        _tile_loadconfig(config);                                                          \
        _tile_loadd(0, c, c_stride);                                                       \
        _tile_loadd(1, a, a_stride);                                                       \
        _tile_stream_loadd(2, b, b_stride);                                                \
        _tile_##name(0, 1, 2);                                                             \
        _tile_stored(0, c, c_stride);                                                      \
        _tile_release();                                                                   \
    }
DOT(dpbf16ps)
DOT(dpbssd)
DOT(dpbsud)
DOT(dpbusd)
DOT(dpbuud)

/* Reads the configuration back after TILEZERO and after TILERELEASE. */
void configurations(const void *config, void *c, long c_stride, void *configured, void *released) {
    _tile_loadconfig(config);
    _tile_loadd(0, c, c_stride);
    _tile_zero(0);
    _tile_stored(0, c, c_stride);
    _tile_storeconfig(configured);
    _tile_release();
    _tile_storeconfig(released);
}
