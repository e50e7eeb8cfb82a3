// The CUDA side of the ops: working memory from torch's allocator, launches on its current stream.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>

#include "backend.h"
#include "checks.h"
#include "cuda/kernels.h"

namespace mac_attn::cuda_backend {

namespace {

using at::Tensor;

// C10_CUDA_CHECK, which of a GPU without code in this build only says that there is no kernel image.
void check(cudaError_t error) {
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
    int device = 0, major = 0, minor = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    cudaGetLastError();  // clears it
    TORCH_CHECK(false, "GPU ", device, " has compute capability ", major, ".", minor,
                ", but mac_attn was built for " MAC_ATTN_CUDA_ARCHES
                " (+PTX: and any later one): build it with TORCH_CUDA_ARCH_LIST=",
                major, ".", minor);
  }
  C10_CUDA_CHECK(error);
}

void check_dtype(DType dtype) {
  TORCH_CHECK_TYPE(dtype != DType::kFloat32, "q is float32, must be bfloat16 or float16 on CUDA");
}

void check_supported(const Shape& shape, DType dtype) {
  check_dtype(dtype);
  const int32_t most = cuda::max_group(shape.head_dim);
  TORCH_CHECK_VALUE(shape.group_size <= most, "num_qo_heads / num_kv_heads is ", shape.group_size,
                    ", must be at most ", most, " with head_dim ", shape.head_dim, " on CUDA");
  TORCH_CHECK_VALUE(shape.head_dim_v == shape.head_dim || shape.head_dim <= cuda::kMostOfShorterValues,
                    "head_dim_v is ", shape.head_dim_v, ", must be ", shape.head_dim,
                    " as head_dim, which is more than ", cuda::kMostOfShorterValues, ", on CUDA");
}

struct Dim {
  int64_t size, stride;
};

// cp.async moves 16 bytes at a time, so every row must begin at a multiple of them.
void check_rows(const void* data, const char* name, int64_t itemsize, std::initializer_list<Dim> dims) {
  bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0;
  at::DimVector strides;
  for (const Dim& dim : dims) {
    aligned = aligned && (dim.size == 1 || dim.stride * itemsize % 16 == 0);
    strides.push_back(dim.stride);
  }
  TORCH_CHECK_VALUE(aligned, name, " has strides ", at::IntArrayRef(strides),
                    ", must have rows aligned to 16 bytes on CUDA");
}

// What the kernels keep between launches, for as many requests as there is room for: [best keys of the queries, two
// numbers each | a counter of match for every KV head | one of amend for every token of it | one more of amend for
// every KV head | amend's counter of pieces | status of every request]. All but the last is zero between launches.
// A call without a ReuseCache has its own.
struct Workspace {
  Tensor memory;
  unsigned long long* best;
  int32_t *match_done, *amend_done, *sampled, *drawn, *status;

  // `tokens`: for how many of the query, where nobody keeps it.
  Workspace(const Shape& shape, int64_t tokens, const Persistent& persistent, const Tensor& on) {
    const int64_t B = shape.batch, Hq = shape.num_qo_heads(), H = shape.num_kv_heads;
    const int64_t T = persistent.workspace ? kMaxQueryTokens : tokens;
    const int64_t each = T * (2 * Hq + H) + 2 * H + 1;
    if (persistent.workspace) {
      memory = *persistent.workspace;
      check_array(memory, "workspace", {kAny}, at::kInt, on.device());
    } else {
      memory = at::zeros({B * each + 1}, on.options().dtype(at::kInt));
    }
    const int64_t room = (memory.numel() - 1) / each;
    TORCH_CHECK_VALUE(B <= room, "batch is ", B, ", must be at most max_batch_size of the ReuseCache, ", room);
    int32_t* first = memory.data_ptr<int32_t>();
    best = reinterpret_cast<unsigned long long*>(first);
    match_done = first + 2 * room * T * Hq;
    amend_done = match_done + room * H;
    sampled = amend_done + room * T * H;
    drawn = sampled + room * H;
    status = drawn + 1;
  }
};

int32_t* error_flag_of(const Persistent& persistent, const Tensor& on) {
  if (!persistent.error_flag) return nullptr;
  check_array(*persistent.error_flag, "error_flag", {1}, at::kInt, on.device());
  return persistent.error_flag->data_ptr<int32_t>();
}

}  // namespace

void match(const MatchParams& p, const Persistent& persistent, const Tensor& on) {
  check_supported(p.shape, p.dtype);
  if (p.shape.batch == 0) return;
  const c10::cuda::CUDAGuard guard(on.device());
  const Workspace workspace(p.shape, p.shape.tokens, persistent, on);
  cuda::MatchWorkspace w{};
  w.best = workspace.best, w.done = workspace.match_done, w.status = workspace.status;
  w.error_flag = error_flag_of(persistent, on);
  check(cuda::match_splits(p, w));
  check(cuda::launch_match(p, w, c10::cuda::getCurrentCUDAStream()));
}

void amend(const AmendParams& p, const Persistent& persistent, const Tensor& on) {
  check_supported(p.shape, p.dtype);
  const int64_t B = p.shape.batch, H = p.shape.num_kv_heads, G = p.shape.group_size, D = p.shape.head_dim;
  if (D > 128) {
    int shared = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, on.device().index()));
    TORCH_CHECK_VALUE(shared >= cuda::kSharedOfLargeHeads, "q has head_dim ", D,
                      ", must be at most 128 on a GPU with ", shared / 1024, " KiB of shared memory for a block");
  }
  TORCH_CHECK_VALUE(p.num_anchors <= cuda::kMaxAnchors, "anchors is ", p.num_anchors, ", must be at most ",
                    cuda::kMaxAnchors, " on CUDA");
  const int32_t most_heads = cuda::most_replaced_heads(p.shape.head_dim);
  TORCH_CHECK_VALUE(p.num_anchors == 0 || G <= most_heads, "num_qo_heads / num_kv_heads is ", G,
                    ", must be at most ", most_heads, " with anchors and head_dim ", D, " on CUDA");
  TORCH_CHECK_VALUE(!p.kv.float8 || D % 16 == 0, "q has head_dim ", D,
                    ", must be a multiple of 16 with a float8 cache on CUDA");
  TORCH_CHECK_VALUE(!p.kv.float8 || p.shape.head_dim_v % 16 == 0, "v_cache has head_dim_v ", p.shape.head_dim_v,
                    ", must be a multiple of 16 with a float8 cache on CUDA");
  const int64_t kv_itemsize = p.kv.float8 ? 1 : 2;
  const int64_t Hq = p.shape.num_qo_heads(), T = p.shape.tokens;
  const int64_t pages = p.kv.num_pages, page_size = p.kv.page_size;
  check_rows(p.query.data, "q", 2,
             {{B, p.query.batch_stride}, {T, p.query.token_stride}, {Hq, p.query.head_stride}});
  check_rows(p.kv.k, "k_cache", kv_itemsize,
             {{pages, p.kv.k_page_stride}, {page_size, p.kv.k_token_stride}, {H, p.kv.k_head_stride}});
  check_rows(p.kv.v, "v_cache", kv_itemsize,
             {{pages, p.kv.v_page_stride}, {page_size, p.kv.v_token_stride}, {H, p.kv.v_head_stride}});
  if (B == 0) return;
  const c10::cuda::CUDAGuard guard(on.device());
  int32_t ctas = 0;
  check(cuda::amend_ctas(p, &ctas));

  const Workspace workspace(p.shape, p.matched.source ? p.shape.tokens : 1, persistent, on);
  cuda::AmendWorkspace w{};
  w.status = workspace.status;
  w.done = workspace.amend_done;
  w.sampled = workspace.sampled;
  w.drawn = workspace.drawn;
  w.error_flag = error_flag_of(persistent, on);
  TORCH_CHECK_VALUE(cuda::describe(p, ctas, w),
                    "k_cache or v_cache spans more than 64 GiB, must be at most that on CUDA");
  const int64_t tiles = cuda::max_passes(p, w) * ((w.max_tokens + p.num_anchors) / (4 * cuda::kWarpTokens) + 3);
  TORCH_CHECK_VALUE(tiles < INT32_MAX, "block_table has ", B, " rows of ", p.kv.max_pages, " pages of ",
                    p.kv.page_size, " tokens, must have fewer than 2^31 tiles of 64 in all KV heads");
  const auto floats = on.options().dtype(at::kFloat);
  const int64_t states = cuda::max_pieces(p, w, ctas) * kNumSpans * w.tile_heads;
  const int64_t padded = cuda::padded_head_dim(p.shape);
  Tensor partial = at::empty({states * (padded + 4)}, floats);
  w.partial_out = partial.data_ptr<float>();
  w.partial_sums = w.partial_out + states * padded;
  w.candidate = static_cast<cuda::Candidate*>(p.candidates);
  Tensor candidates;
  if (p.num_anchors > 0 && !p.candidates) {
    const int64_t room = B * H * kCandidateRoom * p.num_anchors;
    candidates = at::empty({room * kCandidateBytes}, on.options().dtype(at::kByte));
    w.candidate = static_cast<cuda::Candidate*>(candidates.data_ptr());
  }
  check(cuda::launch_amend(p, w, ctas, c10::cuda::getCurrentCUDAStream()));
}

void complete(const CompleteParams& p, const Persistent& persistent, const Tensor& on) {
  check_supported(p.shape, p.dtype);
  if (p.shape.batch == 0) return;
  const c10::cuda::CUDAGuard guard(on.device());
  const int32_t* status = nullptr;
  if (p.matched.source) status = Workspace(p.shape, p.shape.tokens, persistent, on).status;
  const cuda::CompleteWorkspace w{status, cuda::Divisor(p.shape.group_size)};
  check(cuda::launch_complete(p, w, c10::cuda::getCurrentCUDAStream()));
}

void unrotate(const UnrotateParams& p, const Tensor& on) {
  check_dtype(p.dtype);
  TORCH_CHECK_VALUE(p.shape.num_qo_heads() <= cuda::kMaxUnrotateHeads, "num_qo_heads is ", p.shape.num_qo_heads(),
                    ", must be at most ", cuda::kMaxUnrotateHeads, " on CUDA");
  if (p.shape.batch == 0) return;
  const c10::cuda::CUDAGuard guard(on.device());
  check(cuda::launch_unrotate(p, c10::cuda::getCurrentCUDAStream()));
}

}  // namespace mac_attn::cuda_backend
