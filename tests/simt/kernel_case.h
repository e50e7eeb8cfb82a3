// What the tests of the kernels share: random tensors as awkward as the kernels must bear them.
//
// Every tensor is a heap allocation of exactly the elements that its view reaches, so that AddressSanitizer sees
// one beyond. Gaps between rows, and rows that nobody may read, hold NaN; unused page ids and slots are garbage.
#pragma once

#include <cstring>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "launch_kernels.h"
#include "reference.h"

namespace mac_attn::simt {

constexpr int32_t kGarbage = 0x40000001;  // as a page, a slot, a token: far out of bounds

// The 16-bit formats, by arithmetic.
uint16_t encode(DType dtype, double value);
double decode(DType dtype, uint16_t bits);
double unit_roundoff(DType dtype);  // largest relative error of rounding to it

class Data {
 public:
  explicit Data(uint64_t seed) : generator_(seed) {}
  double normal() { return normal_(generator_); }
  int below(int limit) { return static_cast<int>(generator_() % static_cast<uint64_t>(limit)); }
  template <typename T>
  void shuffle(std::vector<T>& values) {
    for (size_t i = values.size(); i > 1; --i) std::swap(values[i - 1], values[below(static_cast<int>(i))]);
  }

 private:
  std::mt19937_64 generator_;
  std::normal_distribution<double> normal_;
};

// A [B, Hq, D] or, of several tokens, [B, T Hq, D] tensor of 16-bit numbers with gaps.
class HeadsTensor {
 public:
  HeadsTensor(DType dtype, int batch, int heads, int head_dim, double scale, Data& data);
  HeadsView view(int heads_of_token = 0) const {
    return {values_.data(), batch_stride_, head_stride_, heads_of_token * head_stride_};
  }
  reference::Vector row(int request, int head) const;
  void set(int request, int head, int d, double value) {
    values_[request * batch_stride_ + head * head_stride_ + d] = encode(dtype_, value);
  }
  const std::vector<uint16_t>& bits() const { return values_; }

 private:
  DType dtype_;
  int head_dim_;
  int64_t head_stride_, batch_stride_;
  std::vector<uint16_t> values_;
};

// float8_e4m3fn, by a table of all of its numbers.
uint8_t encode_fp8(double value);
double decode_fp8(uint8_t bits);

// A paged KV cache: pages in random order, K and V with strides of their own. All NaN until rows are set. One of
// fp8 has scales, one for all KV heads or one for each.
class Pages {
 public:
  Pages(DType dtype, bool fp8, const std::vector<int>& lengths, int num_kv_heads, int head_dim, int head_dim_v,
        int page_size, bool hnd, Data& data);
  KVPages view() const;
  // Rounds numbers to those that a row can hold.
  void round(int kv_head, reference::Vector& k, reference::Vector& v) const;
  void set(int request, int token, int kv_head, const reference::Vector& k, const reference::Vector& v);
  int num_pages() const { return num_pages_; }
  int32_t& page_id(int request, int page) { return block_table_[request * table_stride_ + page]; }
  const std::vector<int32_t>& table() const { return block_table_; }
  const std::vector<char>& k_bytes() const { return k_; }
  const std::vector<char>& v_bytes() const { return v_; }

 private:
  struct Strides {
    int64_t page, token, head;
  };
  Strides strides(int row, int gap) const;
  double scale_of(const std::vector<float>& scales, int kv_head) const;
  void put(std::vector<char>& bytes, int64_t at, double value);

  DType dtype_;
  bool fp8_;
  int num_kv_heads_, head_dim_, head_dim_v_, page_size_, num_pages_ = 2, max_pages_ = 1;
  bool hnd_;
  int64_t table_stride_;
  Strides k_strides_, v_strides_;
  std::vector<char> k_, v_;
  std::vector<float> k_scale_, v_scale_;
  std::vector<int32_t> block_table_;
};

// Rings with numbers in every field, all of them random, as the kernels find them.
struct RingTensors {
  RingTensors(DType dtype, const Shape& shape, int num_slots, int entries, int num_anchors, Data& data);
  Ring view() { return {bytes.data(), layout, num_slots}; }
  Ring view() const { return {const_cast<char*>(bytes.data()), layout, num_slots}; }  // to look at
  // Where the entry lies that was stored `ago` entries before the last one.
  int place(int slot, int kv_head, int ago) const {
    const int M = layout.shape.entries;
    return (*view().stored(slot, kv_head) - 1 - ago + 2 * M) % M;
  }

  Shape shape;
  RingLayout layout;
  int num_slots;
  std::vector<char> bytes;
};

// Notes what the kernel must leave as it is, by value.
class Unchanged {
 public:
  template <typename T>
  void note(const std::vector<T>& values) {
    if (values.empty()) return;
    const char* bytes = reinterpret_cast<const char*>(values.data());
    notes_.push_back({bytes, std::string(bytes, values.size() * sizeof(T))});
  }
  bool holds() const {
    for (const auto& [p, copy] : notes_) {
      if (std::memcmp(p, copy.data(), copy.size()) != 0) return false;
    }
    return true;
  }

 private:
  std::vector<std::pair<const void*, std::string>> notes_;
};

// Says once per case which one it was, if a check of it has failed.
class CaseReport {
 public:
  explicit CaseReport(std::string name) : name_(std::move(name)), before_(failed_checks) {}
  ~CaseReport() {
    if (failed_checks != before_) std::printf("  in %s\n", name_.c_str());
  }

 private:
  std::string name_;
  int before_;
};

std::string name_of(const Run& run);

}  // namespace mac_attn::simt
