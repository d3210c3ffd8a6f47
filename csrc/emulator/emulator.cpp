// Runs the blocks of a launch, and answers for the device to torch's C interface, so that the bindings of the CUDA
// operators take CPU tensors.
#include <csetjmp>
#include <cstdio>
#include <cuda_runtime.h>
#include <ucontext.h>
#include <vector>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

namespace emulated {

namespace {

constexpr size_t kStack = 64 << 10;
constexpr int kWarp = 32;

struct Barrier {
  int here = 0;
  unsigned int round = 0;
};

struct Fiber {
  ucontext_t entry;
  jmp_buf place;
  std::vector<char> stack = std::vector<char>(kStack);
  dim3 thread, block_index;
  int index = 0, block = 0, round = 0;
  bool started = false, done = false;
};

struct Warp {
  Barrier barrier;
  int alive = 0;
  alignas(16) char shown[2][kWarp][16];
};

struct Block {
  Barrier barrier;
  int alive = 0;
  std::vector<char> shared;
};

std::vector<Fiber*> fibers;
std::vector<Warp> warps;
std::vector<Block> blocks;  // of the cluster that runs
Barrier of_cluster;
int alive = 0;
int64_t launches = 0;
bool moved = false;  // since the scheduler last began with the first fiber
Fiber* current = nullptr;
const std::function<void()>* work = nullptr;
jmp_buf scheduler;

void yield() {
  Fiber* self = current;
  if (_setjmp(self->place) == 0) _longjmp(scheduler, 1);
}

void release(Barrier& barrier) {
  barrier.here = 0;
  ++barrier.round;
  moved = true;
}

void wait(Barrier& barrier, const int& expected) {
  const unsigned int round = barrier.round;
  if (++barrier.here >= expected) {
    release(barrier);
  } else {
    while (barrier.round == round) yield();
  }
}

Block& own_block() { return blocks[static_cast<size_t>(current->block)]; }
Warp& own_warp() { return warps[static_cast<size_t>(current->index / kWarp)]; }

void run_fiber() {
  (*work)();
  Fiber* self = current;
  self->done = true;
  Warp& warp = own_warp();
  Block& block = own_block();
  // Barriers count the threads that are still there.
  if (--alive > 0 && of_cluster.here >= alive) release(of_cluster);
  if (--block.alive > 0 && block.barrier.here >= block.alive) release(block.barrier);
  if (--warp.alive > 0 && warp.barrier.here >= warp.alive) release(warp.barrier);
  moved = true;
  _longjmp(scheduler, 1);
}

void resume(Fiber* fiber) {
  current = fiber;
  threadIdx = fiber->thread;
  blockIdx = fiber->block_index;
  if (_setjmp(scheduler) != 0) return;
  if (fiber->started) _longjmp(fiber->place, 1);
  fiber->started = true;
  getcontext(&fiber->entry);
  fiber->entry.uc_stack.ss_sp = fiber->stack.data();
  fiber->entry.uc_stack.ss_size = kStack;
  fiber->entry.uc_link = nullptr;
  makecontext(&fiber->entry, run_fiber, 0);
  setcontext(&fiber->entry);
}

void run_cluster(int threads) {
  const int count = int(blocks.size()), per_block = (threads + kWarp - 1) / kWarp;
  alive = threads * count;
  of_cluster = Barrier{};
  warps.assign(static_cast<size_t>(per_block * count), Warp{});
  for (int i = 0; i < alive; ++i) {
    Fiber* fiber = fibers[static_cast<size_t>(i)];
    const int block = i / threads, thread = i % threads;
    fiber->block = block;
    fiber->index = block * per_block * kWarp + thread;
    fiber->round = 0;
    fiber->started = fiber->done = false;
    fiber->block_index = dim3(blockIdx.x + unsigned(block), blockIdx.y, blockIdx.z);
    fiber->thread = dim3(unsigned(thread) % blockDim.x, unsigned(thread) / blockDim.x % blockDim.y,
                         unsigned(thread) / blockDim.x / blockDim.y);
    ++warps[static_cast<size_t>(fiber->index / kWarp)].alive;
  }
  const int all = alive;
  while (alive > 0) {
    moved = false;
    for (int i = 0; i < all; ++i) {
      if (!fibers[static_cast<size_t>(i)]->done) resume(fibers[static_cast<size_t>(i)]);
    }
    if (!moved) {
      std::fprintf(stderr, "emulated kernel: %d threads wait for others that never come\n", alive);
      std::abort();
    }
  }
}

}  // namespace

void wait_for_block() { wait(own_block().barrier, own_block().alive); }
void wait_for_cluster() { wait(of_cluster, alive); }
void wait_for_warp(unsigned int mask) {
  Warp& warp = own_warp();
  const int named = __builtin_popcount(mask);
  wait(warp.barrier, named < warp.alive ? named : warp.alive);
}
void* shown() { return own_warp().shown[current->round][current->index % kWarp]; }
const void* shown_by(int lane) { return own_warp().shown[current->round][lane]; }
void next_round() { current->round ^= 1; }
void* dynamic_shared() { return own_block().shared.data(); }
const void* of_peer(const void* own, int rank) {
  const char* base = own_block().shared.data();
  return blocks[static_cast<size_t>(rank)].shared.data() + (static_cast<const char*>(own) - base);
}

void run(dim3 grid, dim3 block, size_t shared, const std::function<void()>& body, int cluster) {
  const int threads = int(block.x * block.y * block.z);
  while (fibers.size() < static_cast<size_t>(threads * cluster)) fibers.push_back(new Fiber);
  ++launches;
  gridDim = grid;
  blockDim = block;
  work = &body;
  for (unsigned int z = 0; z < grid.z; ++z) {
    for (unsigned int y = 0; y < grid.y; ++y) {
      for (unsigned int x = 0; x < grid.x; x += unsigned(cluster)) {
        blockIdx = dim3(x, y, z);
        blocks.assign(static_cast<size_t>(cluster), Block{});
        for (Block& one : blocks) {
          one.alive = threads;
          // Uninitialised: a NaN shows who reads what nobody wrote.
          one.shared.assign(shared, char(0xff));
        }
        run_cluster(threads);
      }
    }
  }
}

}  // namespace emulated

extern "C" {

// Kernels launched so far.
int64_t memkern_emulated_launches() { return emulated::launches; }

int32_t aoti_torch_device_type_cuda() { return aoti_torch_device_type_cpu(); }
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return 0;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return 0; }
AOTITorchError torch_c10_cuda_check_msg(int32_t error, const char*, const char*, uint32_t, bool, char** message) {
  *message = error == 0 ? nullptr : strdup("a launcher refused the call");
  return 0;
}
void torch_c10_cuda_free_error_msg(char* message) {
  std::free(message);
}

}
