// Gradients of the search, and inverse norms with theirs. Gradients are gathers of a few rows for each query, summed in
// double, so that no product of a norm and an inverse overflows on the way.
#include "ops/cosine_topk.h"

#include "cpu/isa.h"

#include "common/vec.h"
#include "cpu/cosine_topk/columns.h"
#include "cpu/cosine_topk/score.h"

namespace memkern::cpu::MK_NS {
namespace {

// One place of the result that found a row: (query, rank) as query * k + rank.
struct Place {
  int64_t row;
  int64_t at;
};
struct ByRow {
  bool operator()(const Place& a, const Place& b) const { return a.row < b.row || (a.row == b.row && a.at < b.at); }
};

template <class T>
void widen(const T* from, int64_t width, double* to) {
  for (int64_t i = 0; i < width; ++i) to[i] = double(to_acc(from[i]));
}

double dot(const double* a, const double* b, int64_t width) {
  VecD sums[2] = {VecD(0.0), VecD(0.0)};
  constexpr int N = VecD::N;
  int64_t i = 0;
  for (; i + 2 * N <= width; i += 2 * N) {
    sums[0] = fma(load(a + i), load(b + i), sums[0]);
    sums[1] = fma(load(a + i + N), load(b + i + N), sums[1]);
  }
  for (; i < width; i += N) {
    const int64_t n = std::min<int64_t>(N, width - i);
    sums[0] = fma(load_n(a + i, n), load_n(b + i, n), sums[0]);
  }
  return reduce_sum(sums[0] + sums[1]);
}

void add_scaled(double factor, const double* x, int64_t width, double* sum) {
  for_each_vec<double>(width, [&](int64_t i, auto n) {
    store_part(sum + i, fma(VecD(factor), load_part(x + i, n), load_part(sum + i, n)), n);
  });
}

template <class T>
void round_to(const double* from, int64_t width, T* to) {
  for (int64_t i = 0; i < width; ++i) to[i] = from_acc<T>(acc_t<T>(from[i]));
}

template <class S, class T>
class Gradient {
 public:
  using A = acc_t<T>;

  explicit Gradient(const CosineBackward& p)
      : p_(p), query_(p.width), row_(p.width), sum_(p.width) {}

  // d score / d query = a b x - s b^2 q with a, b the inverse norms of row and query.
  void queries(int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t search = i / p_.queries;
      load_query(i);
      std::fill(sum_.get(), sum_.get() + p_.width, 0.0);
      double along_query = 0;
      for (int64_t j = i * p_.k; j < (i + 1) * p_.k; ++j) {
        if (p_.indices[j] < 0) continue;
        const double g = double(static_cast<const A*>(p_.grad)[j]);
        load_row(search * p_.rows + p_.indices[j]);
        if (p_.normalized) {
          add_scaled(g, row_.get(), p_.width, sum_.get());
          continue;
        }
        const double a = given_inverse(search * p_.rows + p_.indices[j]);
        add_scaled(g * a * query_inverse_, row_.get(), p_.width, sum_.get());
        const double score = dot(query_.get(), row_.get(), p_.width) * a * query_inverse_;
        along_query -= g * score * query_inverse_ * query_inverse_;
      }
      if (along_query != 0) add_scaled(along_query, query_.get(), p_.width, sum_.get());
      round_to(sum_.get(), p_.width, static_cast<S*>(p_.d_query) + i * p_.width);
    }
  }

  // The places [begin, end) that found one row, in order: d score / d row = a b q - s a^2 x with the row's true norm.
  void row(int64_t search, const Place* begin, const Place* end) {
    const int64_t at = search * p_.rows + begin->row;
    load_row(at);
    std::fill(sum_.get(), sum_.get() + p_.width, 0.0);
    const double a = p_.normalized ? 1.0 : own_inverse();
    double along_row = 0;
    for (const Place* place = begin; place != end; ++place) {
      const double g = double(static_cast<const A*>(p_.grad)[place->at]);
      load_query(place->at / p_.k);
      if (p_.normalized) {
        add_scaled(g, query_.get(), p_.width, sum_.get());
        continue;
      }
      add_scaled(g * a * query_inverse_, query_.get(), p_.width, sum_.get());
      along_row -= g * (dot(query_.get(), row_.get(), p_.width) * a * query_inverse_) * a * a;
    }
    if (along_row != 0) add_scaled(along_row, row_.get(), p_.width, sum_.get());
    round_to(sum_.get(), p_.width, static_cast<T*>(p_.d_database) + at * p_.width);
  }

 private:
  void load_query(int64_t i) {
    widen(static_cast<const S*>(p_.query) + i * p_.width, p_.width, query_.get());
    query_inverse_ = inverse_root(dot(query_.get(), query_.get(), p_.width));
  }
  void load_row(int64_t at) { widen(static_cast<const T*>(p_.database) + at * p_.width, p_.width, row_.get()); }
  double own_inverse() const { return double(rounded_inverse<A>(dot(row_.get(), row_.get(), p_.width))); }
  double given_inverse(int64_t at) const {
    return p_.inverse_norms ? double(static_cast<const A*>(p_.inverse_norms)[at]) : own_inverse();
  }

  const CosineBackward& p_;
  Scratch<double> query_, row_, sum_;
  double query_inverse_ = 0;
};

template <class S, class T>
void backward(const CosineBackward& p) {
  if (p.d_query) {
    parallel(p.threads, p.searches * p.queries, 16, [&](int64_t begin, int64_t end) {
      Gradient<S, T>(p).queries(begin, end);
    });
  }
  if (!p.d_database) return;
  std::memset(p.d_database, 0, size_t(p.searches * p.rows * p.width) * sizeof(T));
  const int64_t each = p.queries * p.k;
  Scratch<Place> places(each);
  for (int64_t search = 0; search < p.searches; ++search) {
    int64_t found = 0;
    for (int64_t j = search * each; j < (search + 1) * each; ++j) {
      if (p.indices[j] >= 0) places[found++] = {p.indices[j], j};
    }
    std::sort(places.get(), places.get() + found, ByRow());
    parallel(p.threads, found, 64, [&](int64_t begin, int64_t end) {
      Gradient<S, T> gradient(p);
      // A row belongs to the part in which its first place lies.
      while (begin > 0 && begin < end && places[begin].row == places[begin - 1].row) ++begin;
      while (begin < end) {
        int64_t last = begin + 1;
        while (last < found && places[last].row == places[begin].row) ++last;
        gradient.row(search, &places[begin], places.get() + last);
        begin = last;
      }
    });
  }
}

}  // namespace

void cosine_backward(const CosineBackward& p) {
  if (p.dtype == DType::kF64) return backward<double, double>(p);
  MK_DISPATCH(p.query_dtype, S, {
    if constexpr (!std::is_same_v<S, double>) {
      MK_DISPATCH(p.dtype, T, {
        if constexpr (!std::is_same_v<T, double>) backward<S, T>(p);
      });
    }
  });
}

void inverse_norms(const InverseNorms& p) {
  MK_DISPATCH(p.dtype, T, {
    parallel(p.threads, p.rows, 4096 / std::max<int64_t>(1, p.width) + 1, [&](int64_t begin, int64_t end) {
      const T* database = static_cast<const T*>(p.database);
      for (int64_t r = begin; r < end; ++r) {
        static_cast<acc_t<T>*>(p.out)[r] = rounded_inverse<acc_t<T>>(squared_norm(database + r * p.width, p.width));
      }
    });
  });
}

// d (1 / |x|) / dx = -x / |x|^3.
void inverse_norms_backward(const InverseNorms& p) {
  MK_DISPATCH(p.dtype, T, {
    parallel(p.threads, p.rows, 4096 / std::max<int64_t>(1, p.width) + 1, [&](int64_t begin, int64_t end) {
      const T* database = static_cast<const T*>(p.database);
      T* out = static_cast<T*>(p.out);
      for (int64_t r = begin; r < end; ++r) {
        const double a = inverse_root(squared_norm(database + r * p.width, p.width));
        const double factor = -double(static_cast<const acc_t<T>*>(p.grad)[r]) * a * a * a;
        for (int64_t i = r * p.width; i < (r + 1) * p.width; ++i) {
          out[i] = from_acc<T>(acc_t<T>(a == 0 ? 0.0 : factor * double(to_acc(database[i]))));
        }
      }
    });
  });
}

}  // namespace memkern::cpu::MK_NS
