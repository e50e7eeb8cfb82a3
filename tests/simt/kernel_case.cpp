#include "kernel_case.h"

#include <algorithm>
#include <array>
#include <cmath>

namespace mac_attn::simt {

namespace {

struct Format {
  int mantissa_bits, bias;
};
Format format_of(DType dtype) {
  return dtype == DType::kBFloat16 ? Format{7, 127} : Format{10, 15};
}

}  // namespace

uint16_t encode(DType dtype, double value) {
  const Format format = format_of(dtype);
  if (std::isnan(value)) return 0x7fff;
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  int exponent;
  const double fraction = std::frexp(std::abs(value), &exponent);  // [0.5, 1)
  const int64_t biased = exponent - 1 + format.bias;
  if (value == 0 || biased <= 0) return sign;  // no subnormals
  const int64_t one = int64_t{1} << format.mantissa_bits;
  const auto mantissa = static_cast<int64_t>(std::nearbyint((2 * fraction - 1) * static_cast<double>(one)));
  const int64_t infinity = (0x7fff >> format.mantissa_bits) * one;
  return static_cast<uint16_t>(sign | std::min(biased * one + mantissa, infinity));  // mantissa may be 2^bits
}

double decode(DType dtype, uint16_t bits) {
  const Format format = format_of(dtype);
  const int one = 1 << format.mantissa_bits, magnitude = bits & 0x7fff;
  const int exponent = magnitude / one, mantissa = magnitude % one;
  const double sign = bits & 0x8000 ? -1 : 1;
  if (exponent == 0x7fff / one) return mantissa ? NAN : sign * INFINITY;
  const int shift = std::max(exponent, 1) - format.bias - format.mantissa_bits;
  return sign * std::ldexp(exponent ? one + mantissa : mantissa, shift);
}

double unit_roundoff(DType dtype) {
  return std::ldexp(1.0, -format_of(dtype).mantissa_bits - 1);
}

double decode_fp8(uint8_t bits) {
  const int exponent = bits >> 3 & 15, mantissa = bits & 7;
  if ((bits & 127) == 127) return NAN;
  return (bits & 128 ? -1 : 1) * std::ldexp(exponent ? 8 + mantissa : mantissa, std::max(exponent, 1) - 10);
}

uint8_t encode_fp8(double value) {
  if (std::isnan(value)) return 0x7f;
  static const auto magnitudes = [] {  // in the order of their bits
    std::array<double, 127> all;
    for (uint8_t bits = 0; bits < all.size(); ++bits) all[bits] = decode_fp8(bits);
    return all;
  }();
  const double x = std::min(std::abs(value), magnitudes.back());  // beyond the last, that
  auto bits = static_cast<uint8_t>(std::lower_bound(magnitudes.begin(), magnitudes.end(), x) - magnitudes.begin());
  if (bits > 0) {  // the nearest, of two the even one
    const double gain = (magnitudes[bits] - x) - (x - magnitudes[bits - 1]);
    if (gain > 0 || (gain == 0 && bits % 2 == 1)) --bits;
  }
  return bits | (std::signbit(value) ? 0x80 : 0);
}

HeadsTensor::HeadsTensor(DType dtype, int batch, int heads, int head_dim, double scale, Data& data)
    : dtype_(dtype), head_dim_(head_dim), head_stride_(head_dim + 8), batch_stride_(heads * head_stride_ + 16) {
  values_.assign((batch - 1) * batch_stride_ + (heads - 1) * head_stride_ + head_dim, encode(dtype, NAN));
  for (int b = 0; b < batch; ++b) {
    for (int h = 0; h < heads; ++h) {
      for (int d = 0; d < head_dim; ++d) set(b, h, d, scale * data.normal());
    }
  }
}

reference::Vector HeadsTensor::row(int request, int head) const {
  reference::Vector result;
  for (int d = 0; d < head_dim_; ++d) {
    result.push_back(decode(dtype_, values_[request * batch_stride_ + head * head_stride_ + d]));
  }
  return result;
}

Pages::Strides Pages::strides(int row, int gap) const {
  Strides s;
  if (hnd_) {
    s.token = row + gap;
    s.head = page_size_ * s.token + gap;
    s.page = num_kv_heads_ * s.head + gap;
  } else {
    s.head = row + gap;
    s.token = num_kv_heads_ * s.head + gap;
    s.page = page_size_ * s.token + gap;
  }
  return s;
}

Pages::Pages(DType dtype, bool fp8, const std::vector<int>& lengths, int num_kv_heads, int head_dim, int head_dim_v,
             int page_size, bool hnd, Data& data)
    : dtype_(dtype),
      fp8_(fp8),
      num_kv_heads_(num_kv_heads),
      head_dim_(head_dim),
      head_dim_v_(head_dim_v),
      page_size_(page_size),
      hnd_(hnd) {
  const auto pages_of = [&](int length) { return (std::max(length, 0) + page_size - 1) / page_size; };
  for (const int length : lengths) {
    max_pages_ = std::max(max_pages_, pages_of(length));
    num_pages_ += pages_of(length);
  }
  k_strides_ = strides(head_dim, fp8 ? 16 : 8), v_strides_ = strides(head_dim_v, 0);
  const auto fill = [&](std::vector<char>& bytes, const Strides& s, int row) {
    const int64_t size = (num_pages_ - 1) * s.page + (page_size - 1) * s.token + (num_kv_heads - 1) * s.head + row;
    bytes.resize(size * (fp8 ? 1 : 2));
    for (int64_t i = 0; i < size; ++i) put(bytes, i, NAN);
  };
  fill(k_, k_strides_, head_dim), fill(v_, v_strides_, head_dim_v);
  // From numbers up to 200 to such that many are subnormal.
  for (std::vector<float>* scales : {&k_scale_, &v_scale_}) {
    const int count = !fp8 ? 0 : data.below(2) ? 1 : num_kv_heads;
    for (int i = 0; i < count; ++i) scales->push_back(0.02f * std::pow(300.f, data.below(100) / 100.f));
  }

  std::vector<int32_t> ids;
  for (int i = 0; i < num_pages_; ++i) ids.push_back(i);
  data.shuffle(ids);
  const int batch = static_cast<int>(lengths.size());
  table_stride_ = max_pages_ + 3;
  block_table_.assign((batch - 1) * table_stride_ + max_pages_, kGarbage);
  for (int b = 0; b < batch; ++b) {
    for (int i = 0; i < pages_of(lengths[b]); ++i) {
      page_id(b, i) = ids.back();
      ids.pop_back();
    }
  }
}

KVPages Pages::view() const {
  return {k_.data(),
          v_.data(),
          k_strides_.page,
          k_strides_.token,
          k_strides_.head,
          v_strides_.page,
          v_strides_.token,
          v_strides_.head,
          block_table_.data(),
          table_stride_,
          page_size_,
          num_pages_,
          max_pages_,
          fp8_,
          {k_scale_.empty() ? nullptr : k_scale_.data(), k_scale_.size() > 1 ? 1 : 0},
          {v_scale_.empty() ? nullptr : v_scale_.data(), v_scale_.size() > 1 ? 1 : 0}};
}

double Pages::scale_of(const std::vector<float>& scales, int kv_head) const {
  return scales.empty() ? 1 : scales[scales.size() > 1 ? kv_head : 0];
}

void Pages::put(std::vector<char>& bytes, int64_t at, double value) {
  if (fp8_) {
    bytes[at] = static_cast<char>(encode_fp8(value));
  } else {
    const uint16_t bits = encode(dtype_, value);
    std::memcpy(&bytes[2 * at], &bits, 2);
  }
}

void Pages::round(int kv_head, reference::Vector& k, reference::Vector& v) const {
  const double scales[2] = {scale_of(k_scale_, kv_head), scale_of(v_scale_, kv_head)};
  for (reference::Vector* row : {&k, &v}) {
    const double scale = scales[row == &v];
    for (double& x : *row) {
      x = fp8_ ? scale * decode_fp8(encode_fp8(x / scale)) : decode(dtype_, encode(dtype_, x));
    }
  }
}

void Pages::set(int request, int token, int kv_head, const reference::Vector& k, const reference::Vector& v) {
  const int64_t page = page_id(request, token / page_size_), offset = token % page_size_;
  for (int d = 0; d < head_dim_; ++d) {
    put(k_, page * k_strides_.page + offset * k_strides_.token + kv_head * k_strides_.head + d,
        k[d] / scale_of(k_scale_, kv_head));
  }
  for (int d = 0; d < head_dim_v_; ++d) {
    put(v_, page * v_strides_.page + offset * v_strides_.token + kv_head * v_strides_.head + d,
        v[d] / scale_of(v_scale_, kv_head));
  }
}

RingTensors::RingTensors(DType dtype, const Shape& shape, int num_slots, int entries, int num_anchors, Data& data)
    : shape(shape),
      layout(ring_layout(
          {shape.num_kv_heads, shape.group_size, shape.head_dim, entries, num_anchors, 2, shape.head_dim_v})),
      num_slots(num_slots),
      bytes(num_slots * layout.slot_bytes, 0x5a) {
  const Ring ring = view();
  const int G = shape.group_size, row = G * shape.head_dim;
  const auto normal = [&](float scale) { return scale * static_cast<float>(data.normal()); };
  for (int slot = 0; slot < num_slots; ++slot) {
    *ring.end(slot) = data.below(1000), *ring.reach(slot) = data.below(1000),
    *ring.request(slot) = data.below(1000);
    for (int i = 0; i < kNumCounters; ++i) ring.counters(slot)[i] = data.below(1000);
    for (int h = 0; h < shape.num_kv_heads; ++h) {
      *ring.stored(slot, h) = data.below(2 * entries);
      *ring.tau(slot, h) = 0.01f + std::abs(normal(0.1f));
      *ring.spread(slot, h) = static_cast<float>(data.below(4) ? 5 + data.below(30) : 0) / shape.head_dim;
      *ring.missed(slot, h) = data.below(33);
      for (int g = 0; g < G; ++g) ring.last_lse(slot, h)[g] = normal(3);
      for (int place = 0; place < entries; ++place) {
        *ring.position(slot, h, place) = data.below(1000);
        for (int g = 0; g < G; ++g) {
          ring.depth(slot, h, place)[g] = data.below(5), ring.lse(slot, h, place)[g] = normal(3);
        }
        for (int i = 0; i < row; ++i) {
          ring.query<uint16_t>(slot, h, place)[i] = encode(dtype, data.normal());
          if (i < G * shape.head_dim_v) ring.out(slot, h, place)[i] = normal(1);
          if (num_anchors > 0) ring.rotated<uint16_t>(slot, h, place)[i] = encode(dtype, data.normal());
        }
        for (int i = 0; i < num_anchors; ++i) {
          ring.anchors(slot, h, place)[i] = kGarbage, ring.anchor_weights(slot, h, place)[i] = normal(1);
        }
      }
    }
  }
}

std::string name_of(const Run& run) {
  return (run.engine == Engine::kThreads ? "threads, schedule " : "fibers, schedule ") + std::to_string(run.seed);
}

}  // namespace mac_attn::simt
