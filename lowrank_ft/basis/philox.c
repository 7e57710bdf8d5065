/* Signs from Philox4x32-10, combined with coefficients or with a gradient as soon as they are drawn, so that
 * the basis is never stored. lowrank_ft/basis/philox.py has the specification. */
#include <stdint.h>
#include <string.h>

enum { LANES = 16, ROUNDS = 10, BLOCK = 128, TILE = LANES * BLOCK };

/* Draw LANES consecutive blocks of one basis matrix, side by side so that the compiler vectorises loops. */
static void draw(uint32_t first, uint32_t index, const uint32_t key[2], const uint32_t tail[2],
                 uint32_t words[4][LANES]) {
  uint32_t *c0 = words[0], *c1 = words[1], *c2 = words[2], *c3 = words[3];
  uint32_t k0 = key[0], k1 = key[1];
  for (int l = 0; l < LANES; l++) {
    c0[l] = first + l;
    c1[l] = index;
    c2[l] = tail[0];
    c3[l] = tail[1];
  }
  for (int round = 0; round < ROUNDS; round++) {
    for (int l = 0; l < LANES; l++) {
      uint64_t p0 = (uint64_t)c0[l] * 0xD2511F53u, p1 = (uint64_t)c2[l] * 0xCD9E8D57u;
      c0[l] = (uint32_t)(p1 >> 32) ^ c1[l] ^ k0;
      c1[l] = (uint32_t)p1;
      c2[l] = (uint32_t)(p0 >> 32) ^ c3[l] ^ k1;
      c3[l] = (uint32_t)p0;
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

#define KERNELS(T, BITS, UINT)                                                                                \
  /* `value` with its sign flipped where bit j of `word` is set. */                                           \
  static inline T flipped_##BITS(UINT value, uint32_t word, int j) {                                          \
    UINT sign = ((UINT)(word >> j) & 1) << (BITS - 1);                                                        \
    UINT bits = value ^ sign;                                                                                 \
    T result;                                                                                                 \
    memcpy(&result, &bits, sizeof result);                                                                    \
    return result;                                                                                            \
  }                                                                                                           \
                                                                                                              \
  void combine_##BITS(const uint32_t *key, const uint32_t *tail, const T *coefficients, int64_t bases,        \
                      T scale, T *out, int64_t count) {                                                       \
    T tile[TILE];                                                                                             \
    uint32_t words[4][LANES];                                                                                 \
    for (int64_t start = 0; start < count; start += TILE) {                                                   \
      memset(tile, 0, sizeof tile);                                                                           \
      for (int64_t i = 0; i < bases; i++) {                                                                   \
        UINT value;                                                                                           \
        memcpy(&value, coefficients + i, sizeof value);                                                       \
        draw((uint32_t)(start / BLOCK), (uint32_t)i, key, tail, words);                                       \
        for (int l = 0; l < LANES; l++)                                                                       \
          for (int w = 0; w < 4; w++) {                                                                       \
            T *part = tile + l * BLOCK + w * 32;                                                              \
            uint32_t word = words[w][l];                                                                      \
            for (int j = 0; j < 32; j++) part[j] += flipped_##BITS(value, word, j);                           \
          }                                                                                                   \
      }                                                                                                       \
      int64_t left = count - start < TILE ? count - start : TILE;                                             \
      for (int64_t e = 0; e < left; e++) out[start + e] = tile[e] * scale;                                    \
    }                                                                                                         \
  }                                                                                                           \
                                                                                                              \
  void project_##BITS(const uint32_t *key, const uint32_t *tail, const T *gradient, int64_t count,            \
                      double scale, T *out, double *sums, int64_t bases) {                                    \
    UINT tile[TILE];                                                                                          \
    uint32_t words[4][LANES];                                                                                 \
    for (int64_t i = 0; i < bases; i++) sums[i] = 0;                                                          \
    for (int64_t start = 0; start < count; start += TILE) {                                                   \
      int64_t left = count - start < TILE ? count - start : TILE;                                             \
      memset(tile, 0, sizeof tile);                                                                           \
      memcpy(tile, gradient + start, left * sizeof(T));                                                       \
      for (int64_t i = 0; i < bases; i++) {                                                                   \
        T lanes[32] = {0};                                                                                    \
        draw((uint32_t)(start / BLOCK), (uint32_t)i, key, tail, words);                                       \
        for (int l = 0; l < LANES; l++)                                                                       \
          for (int w = 0; w < 4; w++) {                                                                       \
            const UINT *part = tile + l * BLOCK + w * 32;                                                     \
            uint32_t word = words[w][l];                                                                      \
            for (int j = 0; j < 32; j++) lanes[j] += flipped_##BITS(part[j], word, j);                        \
          }                                                                                                   \
        double sum = 0;                                                                                       \
        for (int j = 0; j < 32; j++) sum += lanes[j];                                                         \
        sums[i] += sum;                                                                                       \
      }                                                                                                       \
    }                                                                                                         \
    for (int64_t i = 0; i < bases; i++) out[i] = (T)(sums[i] * scale);                                        \
  }

KERNELS(float, 32, uint32_t)
KERNELS(double, 64, uint64_t)
