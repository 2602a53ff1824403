// The loops that every instruction set shares. Included inside a namespace of the including file's own, so that code
// compiled for different instruction sets is never merged by the linker.
//
// The including file provides, for an element type T:
//   struct Dot<T>:  Acc, Op, kStep; load(const T*), zero(), fma(Acc, Op, Op), sum(Acc)      dot products along K
//   struct Vec<T>:  V, kLanes; load(const T*), loadf, storef(float*), bcast(float), fma, add, store(T*, V)
//   float to_float(T), T from_float(float)                                                  the scalar tail

template <class T, int M, int R>
inline void dot_tile(const T* const* x, const T* a, int64_t in_size, float* h, int64_t h_stride) {
  using D = Dot<T>;
  typename D::Acc acc[M][R];
  for (int m = 0; m < M; ++m)
    for (int r = 0; r < R; ++r) acc[m][r] = D::zero();
  int64_t k = 0;
  for (; k + D::kStep <= in_size; k += D::kStep) {
    typename D::Op ops[M];
    for (int m = 0; m < M; ++m) ops[m] = D::load(x[m] + k);
    for (int r = 0; r < R; ++r) {
      const typename D::Op w = D::load(a + r * in_size + k);
      for (int m = 0; m < M; ++m) acc[m][r] = D::fma(acc[m][r], ops[m], w);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int r = 0; r < R; ++r) {
      float sum = D::sum(acc[m][r]);
      for (int64_t j = k; j < in_size; ++j) sum += to_float(x[m][j]) * to_float(a[r * in_size + j]);
      h[m * h_stride + r] = sum;
    }
}

template <class T, int M>
inline void dot_rows(const T* const* x, const T* a, int rows, int64_t in_size, float* h, int64_t h_stride) {
  // Eight rows of one page together for few tokens (more streams in flight), four for many (registers).
  constexpr int kWide = M <= 2 ? 8 : 4;
  int r = 0;
  for (; r + kWide <= rows; r += kWide) dot_tile<T, M, kWide>(x, a + r * in_size, in_size, h + r, h_stride);
  for (; r + 4 <= rows; r += 4) dot_tile<T, M, 4>(x, a + r * in_size, in_size, h + r, h_stride);
  for (; r + 2 <= rows; r += 2) dot_tile<T, M, 2>(x, a + r * in_size, in_size, h + r, h_stride);
  for (; r < rows; ++r) dot_tile<T, M, 1>(x, a + r * in_size, in_size, h + r, h_stride);
}

template <class T>
void shrink(const void* const* x_rows, int tokens, const void* a_rows, int rows, int64_t in_size, float* h,
            int64_t h_stride) {
  const T* const* x = reinterpret_cast<const T* const*>(x_rows);
  const T* a = static_cast<const T*>(a_rows);
  int m = 0;
  for (; m + 4 <= tokens; m += 4) dot_rows<T, 4>(x + m, a, rows, in_size, h + m * h_stride, h_stride);
  for (; m + 2 <= tokens; m += 2) dot_rows<T, 2>(x + m, a, rows, in_size, h + m * h_stride, h_stride);
  for (; m < tokens; ++m) dot_rows<T, 1>(x + m, a, rows, in_size, h + m * h_stride, h_stride);
}

// acc[m][n0 ... n0 + U * lanes) += sum over i < ROWS (or rows) of h[m][i] * b[i][n...]
template <class T, int M, int U, int ROWS>
inline void axpy_tile(float* acc, const float* h, int64_t h_stride, const T* b, int rows, int64_t row_stride) {
  using X = Vec<T>;
  typename X::V sum[M][U];
  for (int m = 0; m < M; ++m)
    for (int u = 0; u < U; ++u) sum[m][u] = X::loadf(acc + m * kMaxColumns + u * X::kLanes);
  const int n_rows = ROWS > 0 ? ROWS : rows;
  for (int i = 0; i < n_rows; ++i) {
    typename X::V w[U];
    for (int u = 0; u < U; ++u) w[u] = X::load(b + i * row_stride + u * X::kLanes);
    for (int m = 0; m < M; ++m) {
      const typename X::V s = X::bcast(h[m * h_stride + i]);
      for (int u = 0; u < U; ++u) sum[m][u] = X::fma(sum[m][u], s, w[u]);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int u = 0; u < U; ++u) X::storef(acc + m * kMaxColumns + u * X::kLanes, sum[m][u]);
}

template <class T, int M>
inline void axpy_rows(float* acc, const float* h, int64_t h_stride, const T* b, int rows, int64_t row_stride,
                      int columns) {
  constexpr int kU = 4, kLanes = Vec<T>::kLanes;
  int n = 0;
  if (rows == 8) {
    for (; n + kU * kLanes <= columns; n += kU * kLanes)
      axpy_tile<T, M, kU, 8>(acc + n, h, h_stride, b + n, 8, row_stride);
    for (; n + kLanes <= columns; n += kLanes) axpy_tile<T, M, 1, 8>(acc + n, h, h_stride, b + n, 8, row_stride);
  } else {
    for (; n + kU * kLanes <= columns; n += kU * kLanes)
      axpy_tile<T, M, kU, 0>(acc + n, h, h_stride, b + n, rows, row_stride);
    for (; n + kLanes <= columns; n += kLanes) axpy_tile<T, M, 1, 0>(acc + n, h, h_stride, b + n, rows, row_stride);
  }
  for (; n < columns; ++n)
    for (int m = 0; m < M; ++m)
      for (int i = 0; i < rows; ++i)
        acc[m * kMaxColumns + n] += h[m * h_stride + i] * to_float(b[i * row_stride + n]);
}

template <class T, int M>
inline void expand_tokens(T* const* y, const float* h, int64_t h_stride, const T* const* pages, int page_rows, int rank,
                          int64_t row_stride, int columns, int add) {
  alignas(64) float acc[M * kMaxColumns];
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < columns; ++n) acc[m * kMaxColumns + n] = 0.f;
  for (int r = 0; r < rank; r += page_rows) {
    const int rows = rank - r < page_rows ? rank - r : page_rows;
    axpy_rows<T, M>(acc, h + r, h_stride, pages[r / page_rows], rows, row_stride, columns);
  }
  using X = Vec<T>;
  for (int m = 0; m < M; ++m) {
    const float* from = acc + m * kMaxColumns;
    int n = 0;
    for (; n + X::kLanes <= columns; n += X::kLanes) {
      typename X::V value = X::loadf(from + n);
      if (add) value = X::add(value, X::load(y[m] + n));
      X::store(y[m] + n, value);
    }
    for (; n < columns; ++n) y[m][n] = from_float<T>(from[n] + (add ? to_float(y[m][n]) : 0.f));
  }
}

template <class T>
void expand(void* const* y_rows, int tokens, const float* h, int64_t h_stride, const void* const* pages, int page_rows,
            int rank, int64_t row_stride, int columns, int add) {
  T* const* y = reinterpret_cast<T* const*>(y_rows);
  const T* const* b = reinterpret_cast<const T* const*>(pages);
  int m = 0;
  for (; m + 4 <= tokens; m += 4)
    expand_tokens<T, 4>(y + m, h + m * h_stride, h_stride, b, page_rows, rank, row_stride, columns, add);
  for (; m + 2 <= tokens; m += 2)
    expand_tokens<T, 2>(y + m, h + m * h_stride, h_stride, b, page_rows, rank, row_stride, columns, add);
  for (; m < tokens; ++m)
    expand_tokens<T, 1>(y + m, h + m * h_stride, h_stride, b, page_rows, rank, row_stride, columns, add);
}
