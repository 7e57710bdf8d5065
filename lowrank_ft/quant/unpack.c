/* Packed codes into float32: whole blocks, each code's level times the scale of its block. The layout of codes is
 * that of lowrank_ft/quant/packing.py. */
#include <stdint.h>
#include <string.h>

/* Fill the table: the levels of the `each` codes in every possible word. */
static void fill(const float *levels, int bits, int each, float *table) {
  for (int word = 0; word < 1 << (bits * each); word++)
    for (int i = 0; i < each; i++) table[word * each + i] = levels[(word >> (bits * i)) & ((1 << bits) - 1)];
}

void unpack(const uint8_t *codes, const float *levels, const float *scales, int64_t bits, int64_t block,
            int64_t blocks, float *out) {
  float table[4096 * 4];
  if (bits != 8) fill(levels, (int)bits, bits == 3 ? 4 : 8 / (int)bits, table);
  for (int64_t b = 0; b < blocks; b++, codes += block * bits / 8, out += block) {
    if (bits == 2)
      for (int64_t i = 0; i < block / 4; i++) memcpy(out + 4 * i, table + 4 * codes[i], 4 * sizeof(float));
    else if (bits == 3)
      for (int64_t i = 0; i < block / 8; i++) {
        const uint8_t *c = codes + 3 * i;
        memcpy(out + 8 * i, table + 4 * (c[0] | (c[1] & 15) << 8), 4 * sizeof(float));
        memcpy(out + 8 * i + 4, table + 4 * (c[1] >> 4 | c[2] << 4), 4 * sizeof(float));
      }
    else if (bits == 4)
      for (int64_t i = 0; i < block / 2; i++) memcpy(out + 2 * i, table + 2 * codes[i], 2 * sizeof(float));
    else
      for (int64_t i = 0; i < block; i++) out[i] = levels[codes[i]];
    for (int64_t i = 0; i < block; i++) out[i] *= scales[b];
  }
}

/* Scales of blocks `first`, first + 1, …: the code's magnitude, as a fraction of `largest`, times the largest
 * scale of its group, plus the smallest scale of all (`offset`). Codes above `largest` are negative scales. */
void read_scales(const uint8_t *codes, const float *supers, const float *offset, int64_t largest, int64_t group,
                 int64_t first, int64_t count, float *out) {
  for (int64_t i = 0; i < count; i++) {
    float step = supers[(first + i) / group] / (float)largest;
    float magnitude = (float)(codes[i] & largest) * step + *offset;
    out[i] = codes[i] > largest ? -magnitude : magnitude;
  }
}
