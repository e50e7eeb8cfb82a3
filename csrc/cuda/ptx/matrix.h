// Matrix fragments and products of a warp (PTX ISA 9.7.14: ldmatrix, movmatrix, mma; sm_80).
//
// An 8x8 matrix of 16-bit elements lies in a warp as one register a lane: lane l holds elements
// 2 (l % 4) + {0, 1} of row l / 4, the first in the low half.
#pragma once

#include <type_traits>

#include "../simt.h"
#include "math.h"

namespace mac_attn::ptx {

#if defined(__CUDACC__)

// Four 8x8 matrices; lanes 8 i .. 8 i + 7 give the addresses of the rows of matrix i, 16 bytes each.
MAC_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// The same, each matrix transposed.
MAC_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// Transposes an 8x8 matrix that lies in the warp's registers.
MAC_DEVICE uint32_t movmatrix_trans(uint32_t r) {
  uint32_t transposed;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(r));
  return transposed;
}

// c[16, 8] += a[16, 16] b[16, 8], fp32 sums. Lane l holds
//   a[i]: rows l / 4 + 8 (i % 2), columns 2 (l % 4) + 8 (i / 2) + {0, 1},
//   b<i>: rows 2 (l % 4) + 8 i + {0, 1} of column l / 4,
//   c[i]: row l / 4 + 8 (i / 2), column 2 (l % 4) + i % 2.
template <typename T>
MAC_DEVICE void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, bf16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

#else

struct MatrixRow {
  uint16_t element[8];
};
struct Registers4 {
  uint32_t r[4];
};

// Every lane reads the row that it points to, by itself and at once: ldmatrix orders no other lane's writes
// before it.
inline MatrixRow matrix_row(const char* name, const void* row) {
  simt::check_shared(name, row, sizeof(MatrixRow));
  MatrixRow data;
  std::memcpy(&data, row, sizeof data);
  return data;
}

MAC_SIMT_UNCHECKED inline void ldmatrix_of_warp(const MatrixRow* rows, Registers4* out) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const uint16_t* pair = rows[8 * i + lane / 4].element + lane % 4 * 2;
      out[lane].r[i] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
    }
  }
}

MAC_SIMT_UNCHECKED inline void ldmatrix_trans_of_warp(const MatrixRow* rows, Registers4* out) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const MatrixRow* pair = rows + 8 * i + lane % 4 * 2;
      out[lane].r[i] = pair[0].element[lane / 4] | static_cast<uint32_t>(pair[1].element[lane / 4]) << 16;
    }
  }
}

MAC_SIMT_UNCHECKED inline void movmatrix_trans_of_warp(const uint32_t* in, uint32_t* out) {
  uint32_t element[8][8];
  for (int lane = 0; lane < 32; ++lane) {
    element[lane / 4][lane % 4 * 2] = in[lane] & 0xffffu;
    element[lane / 4][lane % 4 * 2 + 1] = in[lane] >> 16;
  }
  for (int lane = 0; lane < 32; ++lane) {
    out[lane] = element[lane % 4 * 2][lane / 4] | element[lane % 4 * 2 + 1][lane / 4] << 16;
  }
}

struct MmaOperands {
  float c[4];
  uint32_t a[4];
  uint32_t b[2];
};
struct MmaResult {
  float c[4];
};

template <typename T>
MAC_SIMT_UNCHECKED inline void mma_of_warp(const MmaOperands* in, MmaResult* out) {
  float a[16][16], b[16][8], c[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int row = lane / 4, pair = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      const uint32_t word = in[lane].a[i];
      a[row + i % 2 * 8][pair + i / 2 * 8] = from_16_bits<T>(word & 0xffffu);
      a[row + i % 2 * 8][pair + i / 2 * 8 + 1] = from_16_bits<T>(word >> 16);
      c[row + i / 2 * 8][pair + i % 2] = in[lane].c[i];
    }
    for (int i = 0; i < 2; ++i) {
      const uint32_t word = in[lane].b[i];
      b[pair + i * 8][row] = from_16_bits<T>(word & 0xffffu);
      b[pair + i * 8 + 1][row] = from_16_bits<T>(word >> 16);
    }
  }
  for (int m = 0; m < 16; ++m) {
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < 8; ++n) c[m][n] += a[m][k] * b[k][n];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) out[lane].c[i] = c[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  }
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  const Registers4 out = simt::collective<ldmatrix_of_warp>("ldmatrix_x4", matrix_row("ldmatrix_x4", row));
  std::memcpy(r, out.r, sizeof r);
}

inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  const Registers4 out =
      simt::collective<ldmatrix_trans_of_warp>("ldmatrix_x4_trans", matrix_row("ldmatrix_x4_trans", row));
  std::memcpy(r, out.r, sizeof r);
}

inline uint32_t movmatrix_trans(uint32_t r) {
  return simt::collective<movmatrix_trans_of_warp>("movmatrix_trans", r);
}

template <typename T>
inline void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  MmaOperands in{{c[0], c[1], c[2], c[3]}, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  const MmaResult out = simt::collective<mma_of_warp<T> >("mma_m16n8k16", in);
  std::memcpy(c, out.c, sizeof c);
  if (simt::place->lane == 0) ++simt::thread_counters().matrix_products;
}

#endif

}  // namespace mac_attn::ptx
