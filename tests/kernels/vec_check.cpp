// Prints the largest errors of common/vec.h in ulp, and fails on a wrong special value; tests/kernels/test_vec.py runs it.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>

#include "cpu/isa.h"
#include "common/vec.h"

namespace memkern::cpu::MK_NS {

int failures = 0;

void expect(bool ok, const char* what, double x) {
  if (!ok) {
    std::printf("wrong: %s at %.17g\n", what, x);
    ++failures;
  }
}

template <class A>
double ulps(A got, long double want) {
  const A near = A(want);
  if (got == near || (got != got && near != near)) return 0;
  if (std::isinf(near) || std::isinf(got)) return 1e30;
  const A step = std::max(std::abs(std::nextafter(near, std::numeric_limits<A>::infinity()) - near),
                          std::numeric_limits<A>::denorm_min());
  return double(std::abs((long double)got - want) / step);
}

template <class A, class F, class G>
void worst(const char* name, double low, double high, double allowed, F function, G exact) {
  std::mt19937_64 random(7);
  std::uniform_real_distribution<double> uniform(low, high), logarithm(-38, 2);
  double most = 0, at = 0;
  constexpr int N = Vec<A>::N;
  A x[N], y[N];
  for (int round = 0; round < 40000; ++round) {
    for (int i = 0; i < N; ++i) {
      double v = uniform(random);
      if (round % 4 == 0) v = std::copysign(std::exp(logarithm(random)), v) * 1.0;
      x[i] = A(std::min(std::max(v, low), high));
    }
    store(y, function(load(x)));
    for (int i = 0; i < N; ++i) {
      const double error = ulps(y[i], (long double)exact((long double)x[i]));
      if (error > most) most = error, at = double(x[i]);
    }
  }
  std::printf("%s %s %.3f at %.17g\n", name, sizeof(A) == 4 ? "float" : "double", most, at);
  expect(most <= allowed, name, at);
}

template <class A>
void functions() {
  const double far = sizeof(A) == 4 ? 110 : 760, inf = std::numeric_limits<double>::infinity();
  worst<A>("exp", -far, far, 1.5, [](Vec<A> x) { return exp(x); }, [](long double x) { return std::exp(x); });
  worst<A>("log", 0, 100, 1.5, [](Vec<A> x) { return log(x); }, [](long double x) { return std::log(x); });
  worst<A>("log1p", -0.99, 50, 2.5, [](Vec<A> x) { return log1p(x); }, [](long double x) { return std::log1p(x); });
  worst<A>("tanh", -20, 20, 2, [](Vec<A> x) { return tanh(x); }, [](long double x) { return std::tanh(x); });
  worst<A>("sigmoid", -far, far, 2.5, [](Vec<A> x) { return sigmoid(x); },
           [](long double x) { return x < 0 ? std::exp(x) / (1 + std::exp(x)) : 1 / (1 + std::exp(-x)); });
  worst<A>("softplus", -far, far, 2.5, [](Vec<A> x) { return softplus(x); },
           [](long double x) { return std::max(x, 0.0L) + std::log1p(std::exp(-std::abs(x))); });
  worst<A>("sqrt", 0, 1e6, 0.5001, [](Vec<A> x) { return sqrt(x); }, [](long double x) { return std::sqrt(x); });
  const double special[] = {0.0, -0.0, inf, -inf, std::nan(""), 1.0, -1.0, double(std::numeric_limits<A>::denorm_min()),
                            double(std::numeric_limits<A>::max()), -double(std::numeric_limits<A>::max())};
  for (double s : special) {
    const A x = A(s);
    auto same = [&](Vec<A> got, double want, const char* name) {
      expect(got[0] == A(want) || (got[0] != got[0] && want != want) || ulps(got[0], (long double)want) < 2, name, s);
    };
    same(exp(Vec<A>(x)), std::exp(double(x)), "exp");
    same(log(Vec<A>(x)), std::log(double(x)), "log");
    same(log1p(Vec<A>(x)), std::log1p(double(x)), "log1p");
    same(tanh(Vec<A>(x)), std::tanh(double(x)), "tanh");
    same(sigmoid(Vec<A>(x)), 1 / (1 + std::exp(-double(x))), "sigmoid");
    same(abs(Vec<A>(x)), std::abs(double(x)), "abs");
    expect(any(is_nan(Vec<A>(x))) == (s != s), "is_nan", s);
    expect(std::isnan(max_nan(Vec<A>(x), Vec<A>(A(std::nan(""))))[0]), "max_nan", s);
    expect(std::isnan(max_nan(Vec<A>(A(std::nan(""))), Vec<A>(x))[0]), "max_nan", s);
  }
}

// Round trips of every 16-bit value, ties and their neighbours, through vectors, tails and single elements.
template <class T>
void conversions(const char* name) {
  constexpr int N = VecF::N;
  for (uint32_t code = 0; code < 0x10000; code += N) {
    T in[N], out[N];
    float wide[N];
    for (int i = 0; i < N; ++i) in[i].bits = uint16_t(code + i);
    const VecF x = load(in);
    store(wide, x);
    store(out, x);
    for (int i = 0; i < N; ++i) {
      const float one = to_acc(in[i]);
      expect(one == wide[i] || (one != one && wide[i] != wide[i]), name, in[i].bits);
      expect(out[i].bits == in[i].bits || one != one, name, in[i].bits);
      expect(one == one || to_acc(out[i]) != to_acc(out[i]), name, in[i].bits);
      const T next{uint16_t(in[i].bits + 1)};
      const float above = to_acc(next);
      if (!(std::abs(one) < 1e30f && std::abs(above) < 1e30f) || (in[i].bits & 0x7fff) == 0x7fff) continue;
      const float middle = float((double(one) + double(above)) / 2);
      const float samples[] = {middle, std::nextafter(middle, one), std::nextafter(middle, above)};
      const uint16_t even = (in[i].bits & 1) ? next.bits : in[i].bits;
      const uint16_t wanted[] = {even, in[i].bits, next.bits};
      for (int s = 0; s < 3; ++s) {
        T got[N];
        store(got, VecF(samples[s]));
        expect(got[0].bits == wanted[s] && from_acc<T>(samples[s]).bits == wanted[s], name, samples[s]);
      }
    }
  }
}

template <class T>
void tails() {
  using A = acc_t<T>;
  constexpr int N = Vec<A>::N;
  for (int n = 0; n <= N; ++n) {
    Scratch<T> in(n), out(n + 1);
    for (int i = 0; i < n; ++i) in[i] = from_acc<T>(A(i + 1));
    out[n] = from_acc<T>(A(-5));
    const Vec<A> x = load_n(in.get(), n);
    for (int i = 0; i < N; ++i) expect(x[i] == (i < n ? A(i + 1) : A(0)), "load_n", i);
    store_n(out.get(), x + A(1), n);
    for (int i = 0; i < n; ++i) expect(to_acc(out[i]) == A(i + 2), "store_n", i);
    expect(to_acc(out[n]) == A(-5), "store_n past the end", n);
    expect(reduce_sum(x) == A(n * (n + 1) / 2), "reduce_sum", n);
    const Vec<A> four[4] = {x, -x, x + x, Vec<A>(A(0))};
    A sums[4];
    reduce_four(four, sums);
    const A sum = A(n * (n + 1) / 2);
    expect(sums[0] == sum && sums[1] == -sum && sums[2] == 2 * sum && sums[3] == 0, "reduce_four", n);
    expect(reduce_max(x) == A(n), "reduce_max", n);
    expect(reduce_min(x) == A(n == N ? 1 : 0), "reduce_min", n);
    expect(any(iota<A>() < A(n)) == (n > 0) && all(iota<A>() < A(n)) == (n == N), "masks", n);
  }
}

int run() {
  functions<float>();
  functions<double>();
  conversions<bf16>("bf16");
  conversions<f16>("f16");
  tails<float>();
  tails<double>();
  tails<bf16>();
  tails<f16>();
  return failures == 0 ? 0 : 1;
}

}  // namespace memkern::cpu::MK_NS

int main() { return memkern::cpu::MK_NS::run(); }
