// Retention on CPUs, in the chunkwise form (docs/method.md, sections 1 and 2): see cpp_cpu.py.
//
// Batch and heads are spread over the threads of XLA's pool. A thread takes one head through its sequence or grid, so
// that the state and a chunk stay in the caches of its core.

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
constexpr int64_t kChunk = 32;  // tokens
constexpr int64_t kSide = 8;  // rows and columns of a tile

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

// Tokens of one head that are read at once, at most `capacity`, and what they need of each other. Matrices have rows of
// whole vectors, filled up with zeros.
template <int64_t capacity>
class Tokens {
 public:
  Tokens(int64_t d, int64_t e)
      : d_(d),
        e_(e),
        d_row_(padded(d)),
        e_row_(padded(e)),
        queries_(capacity * d_row_),
        keys_(capacity * d_row_),
        transposed_keys_(capacity * d_row_),
        values_(capacity * e_row_),
        decayed_values_(capacity * e_row_),
        out_(capacity * e_row_),
        scores_(capacity * capacity),
        mask_(capacity * capacity) {}

  int64_t state_size() const { return d_ * e_row_; }

  void read_state(const float* from, float* state) const {
    for (int64_t i = 0; i < d_; ++i) std::copy_n(from + i * e_, e_, state + i * e_row_);
  }

  void write_state(const float* state, float* to) const {
    for (int64_t i = 0; i < d_; ++i) std::copy_n(state + i * e_row_, e_, to + i * e_);
  }

  // mask(i, j): what is left of key j at query i, 0 where i does not see j, as of all j > i.
  template <typename F>
  void set_mask(int64_t size, F&& mask) {
    for (int64_t i = 0; i < size; ++i)
      for (int64_t j = 0; j < capacity; ++j) mask_[i * capacity + j] = j < size ? mask(i, j) : 0.0f;
  }

  void read(int64_t i, const float* q, const float* k, const float* v) {
    std::copy_n(q, d_, &queries_[i * d_row_]);
    std::copy_n(k, d_, &keys_[i * d_row_]);
    std::copy_n(v, e_, &values_[i * e_row_]);
  }

  void write(int64_t i, float* out) const { std::copy_n(&out_[i * e_row_], e_, out); }

  void decay_value(int64_t i, float decay) {
    for (int64_t j = 0; j < e_row_; ++j) decayed_values_[i * e_row_ + j] = decay * values_[i * e_row_ + j];
  }

  // out = (Q K^T .* mask) V, and decays_i q_i S where there is a state.
  void attend(int64_t size, const float* decays, const float* state) {
    transpose(keys_.data(), capacity, d_row_, transposed_keys_.data());
    score(size);
    weigh(size, decays, state);
  }

  // out_i += decays_i q_i S, of `count` tokens from `first` on, `step` apart.
  [[gnu::noinline]] void add_state(int64_t first, int64_t step, int64_t count, const float* decays, const float* state) {
    for_blocks(count, e_row_, [&]<int rows, int vectors>(Block<rows, vectors> block, int64_t i, int64_t j) {
      const int64_t token = first + i * step;
      block.add_product({&queries_[token * d_row_], step * d_row_, 1}, state + j, e_row_, d_);
      for (int a = 0; a < rows; ++a)
        for (int b = 0; b < vectors; ++b) {
          float* const at = &out_[(token + a * step) * e_row_ + j + b * kLanes];
          store(at, load(at) + decays[i + a] * block.sums[a][b]);
        }
    });
  }

  // S = decay S + K^T V, of `count` tokens from `first` on, `step` apart, their values as `decay_value` left them.
  [[gnu::noinline]] void take_up(int64_t first, int64_t step, int64_t count, float decay, float* state) const {
    for_blocks(d_, e_row_, [&]<int rows, int vectors>(Block<rows, vectors> block, int64_t i, int64_t j) {
      for (int a = 0; a < rows; ++a)
        for (int b = 0; b < vectors; ++b) block.sums[a][b] = decay * load(state + (i + a) * e_row_ + j + b * kLanes);
      block.add_product({&keys_[first * d_row_ + i], 1, step * d_row_}, &decayed_values_[first * e_row_ + j],
                        step * e_row_, count);
      for (int a = 0; a < rows; ++a)
        for (int b = 0; b < vectors; ++b) store(state + (i + a) * e_row_ + j + b * kLanes, block.sums[a][b]);
    });
  }

  // to = decay to + from, states both
  void add(float decay, const float* from, float* to) const {
    for (int64_t i = 0; i < state_size(); i += kLanes) store(to + i, decay * load(to + i) + load(from + i));
  }

 private:
  [[gnu::noinline]] void score(int64_t size) {
    for_blocks(size, capacity, [&]<int rows, int vectors>(Block<rows, vectors> block, int64_t i, int64_t j) {
      if (j >= i + rows) return;
      block.add_product({&queries_[i * d_row_], d_row_, 1}, &transposed_keys_[j], capacity, d_);
      for (int a = 0; a < rows; ++a)
        for (int b = 0; b < vectors; ++b) {
          const int64_t at = (i + a) * capacity + j + b * kLanes;
          store(&scores_[at], block.sums[a][b] * load(&mask_[at]));
        }
    });
  }

  [[gnu::noinline]] void weigh(int64_t size, const float* decays, const float* state) {
    for_blocks(size, e_row_, [&]<int rows, int vectors>(Block<rows, vectors> block, int64_t i, int64_t j) {
      if (state != nullptr) {
        block.add_product({&queries_[i * d_row_], d_row_, 1}, state + j, e_row_, d_);
        for (int a = 0; a < rows; ++a)
          for (int b = 0; b < vectors; ++b) block.sums[a][b] *= decays[i + a];
      }
      block.add_product({&scores_[i * capacity], capacity, 1}, &values_[j], e_row_, i + rows);
      for (int a = 0; a < rows; ++a)
        for (int b = 0; b < vectors; ++b) store(&out_[(i + a) * e_row_ + j + b * kLanes], block.sums[a][b]);
    });
  }

  const int64_t d_, e_, d_row_, e_row_;
  Numbers queries_, keys_, transposed_keys_, values_, decayed_values_, out_, scores_, mask_;
};

// The length of all parts but the last of them, where so many rows or columns are cut into parts of at most kSide.
int64_t parts_of(int64_t length) {
  const int64_t parts = (length + kSide - 1) / kSide;
  return (length + parts - 1) / parts;
}

// gamma^0 .. gamma^(count - 1)
std::vector<float> powers(float log_decay, int64_t count) {
  std::vector<float> decays(count);
  for (int64_t t = 0; t < count; ++t) decays[t] = std::exp(log_decay * static_cast<float>(t));
  return decays;
}

// Where a head's tokens are: pointers to the one that comes first in time, and from each to the next.
struct Place {
  const float *q, *k, *v;
  float* out;
  int64_t d_step, e_step;

  template <int64_t capacity>
  void read(int64_t token, int64_t i, Tokens<capacity>& tokens) const {
    tokens.read(i, q + token * d_step, k + token * d_step, v + token * e_step);
  }

  template <int64_t capacity>
  void write(int64_t i, int64_t token, const Tokens<capacity>& tokens) const {
    tokens.write(i, out + token * e_step);
  }

  void ask_for(int64_t token, int64_t d, int64_t e) const {
    prefetch(q + token * d_step, d);
    prefetch(k + token * d_step, d);
    prefetch(v + token * e_step, e);
  }
};

void read_sequence(int64_t n, int64_t d, int64_t e, Place place, float log_decay, const float* arriving, float* final_state) {
  const std::vector<float> decay = powers(log_decay, kChunk + 1);
  Tokens<kChunk> tokens(d, e);
  tokens.set_mask(kChunk, [&](int64_t i, int64_t j) { return j <= i ? decay[i - j] : 0.0f; });
  Numbers state(tokens.state_size());
  tokens.read_state(arriving, state.data());
  for (int64_t first = 0; first < n; first += kChunk) {
    const int64_t size = std::min(kChunk, n - first);
    // The state that meets the next token has decayed once more than the final one.
    const int64_t after = first + size == n ? size - 1 : size;
    for (int64_t i = first + kChunk; i < std::min(n, first + 2 * kChunk); ++i) place.ask_for(i, d, e);
    for (int64_t i = 0; i < size; ++i) {
      place.read(first + i, i, tokens);
      tokens.decay_value(i, decay[after - i]);
    }
    tokens.attend(size, decay.data(), state.data());
    tokens.take_up(0, 1, size, decay[after], state.data());
    for (int64_t i = 0; i < size; ++i) place.write(i, first + i, tokens);
  }
  tokens.write_state(state.data(), final_state);
}

// As `read_sequence` of a grid, tile by tile; the states, one of each column, are those of `_onward` in
// grid_chunkwise.py: reversed in time they decay when they leave, forward as they arrive.
void read_grid(int64_t rows, int64_t cols, int64_t d, int64_t e, Place place, float log_decay, bool decay_late,
               const float* arriving, float* final_states) {
  const int64_t tile_rows = parts_of(rows), tile_cols = parts_of(cols);
  const std::vector<float> decay = powers(log_decay, 2 * kSide + 1);
  Tokens<kSide * kSide> tokens(d, e);
  const int64_t state = tokens.state_size();
  Numbers above(cols * state), left(kSide * state), along(state), below(state);
  for (int64_t x = 0; x < cols; ++x) tokens.read_state(arriving + x * d * e, &above[x * state]);

  int64_t masked = 0;  // the width of the tile that the mask is of
  for (int64_t y = 0; y < rows; y += tile_rows) {
    const int64_t height = std::min(tile_rows, rows - y);
    std::fill_n(left.data(), kSide * state, 0.0f);
    std::fill_n(below.data(), state, 0.0f);
    for (int64_t x = 0; x < cols; x += tile_cols) {
      const int64_t width = std::min(tile_cols, cols - x), size = height * width;
      if (width != masked) {
        tokens.set_mask(tile_rows * width, [&](int64_t i, int64_t j) {
          const int64_t down = i / width - j / width, right = i % width - j % width;
          return down < 0 || right < 0 ? 0.0f : decay[down + right];
        });
        masked = width;
      }
      for (int64_t i = 0; i < size; ++i) place.read((y + i / width) * cols + x + i % width, i, tokens);
      tokens.attend(size, nullptr, nullptr);
      for (int64_t i = 0; i < height; ++i) tokens.add_state(i * width, 1, width, &decay[1], &left[i * state]);
      for (int64_t j = 0; j < width; ++j)
        tokens.add_state(j, width, height, &decay[decay_late ? 0 : 1], &above[(x + j) * state]);
      for (int64_t i = 0; i < size; ++i) place.write(i, (y + i / width) * cols + x + i % width, tokens);

      for (int64_t i = 0; i < size; ++i) tokens.decay_value(i, decay[width - 1 - i % width]);
      for (int64_t i = 0; i < height; ++i) {
        tokens.take_up(i * width, 1, width, i == 0 ? 0.0f : decay[1], along.data());
        tokens.add(decay[width], along.data(), &left[i * state]);
      }
      for (int64_t i = 0; i < size; ++i) tokens.decay_value(i, decay[height - (decay_late ? 0 : 1) - i / width]);
      for (int64_t j = 0; j < width; ++j) {
        tokens.take_up(j, width, height, decay[1], below.data());
        tokens.add(decay[height], below.data(), &above[(x + j) * state]);
      }
    }
  }
  for (int64_t x = 0; x < cols; ++x) tokens.write_state(&above[x * state], final_states + x * d * e);
}

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

using Result = ffi::ResultBuffer<ffi::F32>;

// One head of one sequence or grid after the other, its tokens and the one that comes first in time.
template <typename F>
void for_heads(ffi::ThreadPool& pool, const Array& q, const Array& k, const Array& v, Result& out, bool reverse, F&& f) {
  const int64_t b = q.dimensions()[0], n = q.dimensions()[1], h = q.dimensions()[2], d = q.dimensions()[3];
  const int64_t e = v.dimensions()[3];
  spread(pool, b * h, [&](int64_t index) {
    const int64_t token = (index / h * n + (reverse ? n - 1 : 0)) * h + index % h, to_next = (reverse ? -1 : 1) * h;
    f(index, index % h, d, e,
      Place{q.typed_data() + token * d, k.typed_data() + token * d, v.typed_data() + token * e,
            out->typed_data() + token * e, to_next * d, to_next * e});
  });
}

ffi::Error sequence(ffi::ThreadPool pool, Array q, Array k, Array v, Array log_decay, Array arriving, Result out,
                    Result final_state, bool reverse) {
  for_heads(pool, q, k, v, out, reverse, [&](int64_t index, int64_t head, int64_t d, int64_t e, const Place& place) {
    read_sequence(q.dimensions()[1], d, e, place, log_decay.typed_data()[head], arriving.typed_data() + index * d * e,
                  final_state->typed_data() + index * d * e);
  });
  return ffi::Error::Success();
}

ffi::Error grid(ffi::ThreadPool pool, Array q, Array k, Array v, Array log_decay, Array arriving, Result out,
                Result final_states, bool reverse) {
  const int64_t cols = arriving.dimensions()[2], rows = q.dimensions()[1] / cols;
  for_heads(pool, q, k, v, out, reverse, [&](int64_t index, int64_t head, int64_t d, int64_t e, const Place& place) {
    read_grid(rows, cols, d, e, place, log_decay.typed_data()[head], reverse,
              arriving.typed_data() + index * cols * d * e, final_states->typed_data() + index * cols * d * e);
  });
  return ffi::Error::Success();
}

auto signature() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<Array>()
      .Arg<Array>()
      .Arg<Array>()
      .Arg<Array>()
      .Arg<Array>()
      .Ret<Array>()
      .Ret<Array>()
      .Attr<bool>("reverse");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(vir_jax_retention, sequence, signature());
XLA_FFI_DEFINE_HANDLER_SYMBOL(vir_jax_retention_2d, grid, signature());
