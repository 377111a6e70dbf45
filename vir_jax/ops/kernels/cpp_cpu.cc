// Retention over a sequence on CPUs, in the chunkwise form (docs/method.md, section 1): see cpp_cpu.py.
//
// Batch and heads are spread over the threads of XLA's pool. A thread takes one head through its sequence, so that the
// state and a chunk stay in the caches of its core.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

#ifdef __AVX512F__
constexpr int kLanes = 16;
constexpr int kVectors = 4;  // of a row of a block: with 4 rows, 16 of 32 registers hold sums
#else
constexpr int kLanes = 8;
constexpr int kVectors = 2;  // of 16 registers
#endif
constexpr int kRows = 4;
constexpr int kChunk = 32;  // tokens

typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef Vector Unaligned __attribute__((aligned(4), may_alias));  // in memory, among floats

[[gnu::always_inline]] inline Vector load(const float* from) { return *reinterpret_cast<const Unaligned*>(from); }

[[gnu::always_inline]] inline void store(float* to, Vector values) { *reinterpret_cast<Unaligned*>(to) = values; }

// Holds a vector in a register: compilers would rather read it again for each row.
[[gnu::always_inline]] inline void keep([[maybe_unused]] Vector& values) {
#ifdef __AVX__
  asm("" : "+v"(values));
#endif
}

// A matrix in memory: element (i, j) is data[i * row + j * column].
struct Matrix {
  const float* data;
  int64_t row;
  int64_t column;
};

// Sums of some rows and vectors of a product, in registers.
template <int rows, int vectors>
struct Block {
  Vector sums[rows][vectors];

  // += left right, `right` with rows of whole vectors.
  [[gnu::always_inline]] void add_product(Matrix left, const float* right, int64_t right_row, int64_t inner) {
    for (int64_t m = 0; m < inner; ++m) {
      float factors[rows];
      for (int i = 0; i < rows; ++i) factors[i] = left.data[i * left.row];
      for (int j = 0; j < vectors; ++j) {
        Vector values = load(right + j * kLanes);
        keep(values);
        for (int i = 0; i < rows; ++i) sums[i][j] += factors[i] * values;
      }
      left.data += left.column;
      right += right_row;
    }
  }
};

// Calls f(block, first row, first column) for blocks that cover rows x columns, columns being whole vectors.
template <int rows, typename F>
[[gnu::always_inline]] inline void row_of_blocks(int64_t row, int64_t columns, F&& f) {
  int64_t column = 0;
  for (; column + kVectors * kLanes <= columns; column += kVectors * kLanes)
    f(Block<rows, kVectors>{}, row, column);
  if (kVectors > 2 && column + 2 * kLanes <= columns) {
    f(Block<rows, 2>{}, row, column);
    column += 2 * kLanes;
  }
  if (column < columns) f(Block<rows, 1>{}, row, column);
}

template <typename F>
[[gnu::always_inline]] inline void for_blocks(int64_t rows, int64_t columns, F&& f) {
  int64_t row = 0;
  for (; row + kRows <= rows; row += kRows) row_of_blocks<kRows>(row, columns, f);
  for (; row < rows; ++row) row_of_blocks<1>(row, columns, f);
}

// The lanes of x, and from kLanes on those of y, in this order.
template <int... lane>
[[gnu::always_inline]] inline Vector shuffle(Vector x, Vector y) {
#ifdef __clang__
  return __builtin_shufflevector(x, y, lane...);
#else
  typedef int32_t Lanes __attribute__((vector_size(4 * kLanes)));
  return __builtin_shuffle(x, y, Lanes{lane...});
#endif
}

template <int stride, int... lane>
[[gnu::always_inline]] inline void exchange(Vector& x, Vector& y, std::integer_sequence<int, lane...>) {
  const Vector low = shuffle<(lane & stride ? kLanes + lane - stride : lane)...>(x, y);
  y = shuffle<(lane & stride ? kLanes + lane : lane + stride)...>(x, y);
  x = low;
}

// One step of a transposition: what lies `stride` off the diagonal changes sides.
template <int stride>
[[gnu::always_inline]] inline void exchange_all(Vector (&square)[kLanes]) {
  if constexpr (stride < kLanes) {
    for (int i = 0; i < kLanes; ++i)
      if (!(i & stride)) exchange<stride>(square[i], square[i + stride], std::make_integer_sequence<int, kLanes>{});
    exchange_all<2 * stride>(square);
  }
}

// Writes the transpose of rows x columns, both whole vectors.
[[gnu::noinline]] void transpose(const float* from, int64_t rows, int64_t columns, float* to) {
  for (int64_t i = 0; i < rows; i += kLanes)
    for (int64_t j = 0; j < columns; j += kLanes) {
      Vector square[kLanes];
      for (int a = 0; a < kLanes; ++a) square[a] = load(from + (i + a) * columns + j);
      exchange_all<1>(square);
      for (int a = 0; a < kLanes; ++a) store(to + (j + a) * rows + i, square[a]);
    }
}

// Asks for a row that is read soon: rows of a head lie too far apart for the hardware to foresee them.
void prefetch(const float* row, int64_t width) {
  for (int64_t i = 0; i < width; i += 16) __builtin_prefetch(row + i);
}

int64_t padded(int64_t width) { return (width + kLanes - 1) / kLanes * kLanes; }

// Zeros from the beginning of a cache line on: a vector across two lines is read at half the speed.
class Numbers {
 public:
  explicit Numbers(int64_t size) : all_(size + kLine) {
    first_ = all_.data() + kLine - reinterpret_cast<uintptr_t>(all_.data()) / sizeof(float) % kLine;
  }
  Numbers(const Numbers&) = delete;
  float& operator[](int64_t i) { return first_[i]; }
  const float& operator[](int64_t i) const { return first_[i]; }
  float* data() { return first_; }
  const float* data() const { return first_; }

 private:
  static constexpr int64_t kLine = 16;  // floats
  std::vector<float> all_;
  float* first_;
};

// One head of one sequence. Its matrices have rows of whole vectors, filled up with zeros.
class Head {
 public:
  Head(int64_t heads, int64_t d, int64_t e, bool reverse)
      : d_(d),
        e_(e),
        d_row_(padded(d)),
        e_row_(padded(e)),
        d_step_((reverse ? -1 : 1) * heads * d),
        e_step_((reverse ? -1 : 1) * heads * e),
        mask_(kChunk * kChunk),
        scores_(kChunk * kChunk),
        queries_(kChunk * d_row_),
        keys_(kChunk * d_row_),
        keys_transposed_(kChunk * d_row_),
        values_(kChunk * e_row_),
        decayed_values_(kChunk * e_row_),
        out_(kChunk * e_row_),
        state_(d_row_ * e_row_) {}

  // The pointers are to the token that comes first in time.
  void run(int64_t n, const float* q, const float* k, const float* v, float log_decay, const float* arriving,
           float* out, float* final_state) {
    for (int t = 0; t <= kChunk; ++t) decay_[t] = std::exp(log_decay * static_cast<float>(t));
    for (int i = 0; i < kChunk; ++i)
      for (int j = 0; j < kChunk; ++j) mask_[i * kChunk + j] = j <= i ? decay_[i - j] : 0.0f;
    for (int64_t i = 0; i < d_; ++i) std::copy_n(arriving + i * e_, e_, &state_[i * e_row_]);
    for (int64_t first = 0; first < n; first += kChunk) {
      const int64_t size = std::min<int64_t>(kChunk, n - first);
      // The state that meets the next token has decayed once more than the final one.
      const int64_t after = first + size == n ? size - 1 : size;
      for (int64_t i = first + kChunk; i < std::min<int64_t>(n, first + 2 * kChunk); ++i) {
        prefetch(q + i * d_step_, d_);
        prefetch(k + i * d_step_, d_);
        prefetch(v + i * e_step_, e_);
      }
      for (int64_t i = 0; i < size; ++i) {
        std::copy_n(q + (first + i) * d_step_, d_, &queries_[i * d_row_]);
        std::copy_n(k + (first + i) * d_step_, d_, &keys_[i * d_row_]);
        std::copy_n(v + (first + i) * e_step_, e_, &values_[i * e_row_]);
        for (int64_t j = 0; j < e_row_; ++j)
          decayed_values_[i * e_row_ + j] = decay_[after - i] * values_[i * e_row_ + j];
      }
      transpose(keys_.data(), kChunk, d_row_, keys_transposed_.data());
      score(size);
      write(size);
      for (int64_t i = 0; i < size; ++i) std::copy_n(&out_[i * e_row_], e_, out + (first + i) * e_step_);
      update(size, decay_[after]);
    }
    for (int64_t i = 0; i < d_; ++i) std::copy_n(&state_[i * e_row_], e_, final_state + i * e_);
  }

 private:
  // scores = (Q K^T) .* D
  [[gnu::noinline]] void score(int64_t size) {
    for_blocks(size, kChunk, [&]<int rows, int vectors>(Block<rows, vectors> block, int64_t i, int64_t j) {
      if (j >= i + rows) return;
      block.add_product({&queries_[i * d_row_], d_row_, 1}, &keys_transposed_[j], kChunk, d_);
      for (int a = 0; a < rows; ++a)
        for (int b = 0; b < vectors; ++b) {
          const int64_t at = (i + a) * kChunk + j + b * kLanes;
          store(&scores_[at], block.sums[a][b] * load(&mask_[at]));
        }
    });
  }

  // O = scores V + gamma^i Q S
  [[gnu::noinline]] void write(int64_t size) {
    for_blocks(size, e_row_, [&]<int rows, int vectors>(Block<rows, vectors> block, int64_t i, int64_t j) {
      block.add_product({&queries_[i * d_row_], d_row_, 1}, &state_[j], e_row_, d_);
      for (int a = 0; a < rows; ++a)
        for (int b = 0; b < vectors; ++b) block.sums[a][b] *= decay_[i + a];
      block.add_product({&scores_[i * kChunk], kChunk, 1}, &values_[j], e_row_, i + rows);
      for (int a = 0; a < rows; ++a)
        for (int b = 0; b < vectors; ++b) store(&out_[(i + a) * e_row_ + j + b * kLanes], block.sums[a][b]);
    });
  }

  // S = decay S + K^T V, the values decayed on their way
  [[gnu::noinline]] void update(int64_t size, float decay) {
    for_blocks(d_, e_row_, [&]<int rows, int vectors>(Block<rows, vectors> block, int64_t i, int64_t j) {
      for (int a = 0; a < rows; ++a)
        for (int b = 0; b < vectors; ++b) block.sums[a][b] = decay * load(&state_[(i + a) * e_row_ + j + b * kLanes]);
      block.add_product({&keys_[i], 1, d_row_}, &decayed_values_[j], e_row_, size);
      for (int a = 0; a < rows; ++a)
        for (int b = 0; b < vectors; ++b) store(&state_[(i + a) * e_row_ + j + b * kLanes], block.sums[a][b]);
    });
  }

  const int64_t d_, e_, d_row_, e_row_, d_step_, e_step_;
  float decay_[kChunk + 1];
  Numbers mask_, scores_, queries_, keys_, keys_transposed_, values_, decayed_values_, out_, state_;
};

// Calls task(0) .. task(count - 1), on this thread and on those of the pool that are free, and waits for them.
template <typename Task>
void spread(ffi::ThreadPool& pool, int64_t count, const Task& task) {
  struct Shared {
    std::atomic<int64_t> next{0};
    std::mutex mutex;
    std::condition_variable changed;
    int64_t done = 0;
  };
  auto shared = std::make_shared<Shared>();
  // A helper that comes too late finds nothing to do, and does not touch `task`, which is gone by then.
  auto work = [shared, count, &task] {
    for (int64_t i; (i = shared->next.fetch_add(1)) < count;) {
      task(i);
      std::lock_guard<std::mutex> lock(shared->mutex);
      if (++shared->done == count) shared->changed.notify_all();
    }
  };
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), count) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule(std::function<void()>(work));
  work();
  std::unique_lock<std::mutex> lock(shared->mutex);
  shared->changed.wait(lock, [&] { return shared->done == count; });
}

using Array = ffi::Buffer<ffi::F32>;

ffi::Error retention(ffi::ThreadPool pool, Array q, Array k, Array v, Array log_decay, Array arriving,
                     ffi::ResultBuffer<ffi::F32> out, ffi::ResultBuffer<ffi::F32> final_state, bool reverse) {
  const int64_t b = q.dimensions()[0], n = q.dimensions()[1], h = q.dimensions()[2], d = q.dimensions()[3];
  const int64_t e = v.dimensions()[3];
  spread(pool, b * h, [&](int64_t index) {
    const int64_t token = (index / h * n + (reverse ? n - 1 : 0)) * h + index % h, state = index * d * e;
    Head(h, d, e, reverse)
        .run(n, q.typed_data() + token * d, k.typed_data() + token * d, v.typed_data() + token * e,
             log_decay.typed_data()[index % h], arriving.typed_data() + state, out->typed_data() + token * e,
             final_state->typed_data() + state);
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(vir_jax_retention, retention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Ret<Array>()
                                  .Ret<Array>()
                                  .Attr<bool>("reverse"));
