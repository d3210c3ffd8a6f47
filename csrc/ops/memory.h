// The memory column's kernels as plain functions over pointers and sizes; memkern/ops/memory/_schemas.py has the contract.
//
// Everything is f: float, or double where dtype is double; everything is contiguous, masks are one byte per element.
// Pointers to what a call does not have are null. A step is a scan of one step: the axis T of a step's tensors has size 1.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/host.h"

namespace memkern {

struct MemorySizes {
  DType dtype;  // kF32 or kF64
  int64_t batch, steps, slots, width, read_heads, write_heads;
  int64_t every;  // steps of a segment
  bool track_usage, track_links, deallocate, detach_usage;
};

// The fields of a state, inputs or (through a cast away of const in the binding) outputs.
template <class P>  // const void* or void*
struct MemoryFields {
  P memory;         // (B, N, W)
  P usage;          // (B, N)
  P links;          // (B, H, N, N)
  P precedence;     // (B, H, N)
  P read_weights;   // (B, R, N)
  P write_weights;  // (B, H, N)
};

template <class P>
struct InterfaceFields {  // each (B, T, ...)
  P read_keys, read_strengths, read_modes, write_keys, write_strengths, write_vectors, erase_vectors, free_gates,
      allocation_gates, write_gates;
};

// What forward leaves for backward, (T, B, ...) and (S - 1, B, ...).
template <class P>
struct MemorySaved {
  P write_content, allocation, read_content, mixed;  // rows of each step
  P usage, read_weights, write_weights;              // the state after each step
  P memory, links, precedence;                       // the state before each segment but the first
};

struct MemoryForward {
  MemorySizes sizes;
  MemoryFields<const void*> state;
  InterfaceFields<const void*> interface;
  const void* sharpness;     // (B, T, R)
  const uint8_t* step_mask;  // (B, T)
  void* reads;               // (B, T, R, W)
  MemoryFields<void*> result;
  MemorySaved<void*> saved;
};

struct MemoryBackward {
  MemorySizes sizes;
  MemoryFields<const void*> state;
  InterfaceFields<const void*> interface;
  const void* sharpness;
  const uint8_t* step_mask;
  MemorySaved<const void*> saved;
  const void* final_memory;  // (B, N, W) after the last step; recomputed when null
  const void* grad_reads;
  MemoryFields<const void*> grads;
  MemoryFields<void*> d_state;
  InterfaceFields<void*> d_interface;
  void* d_sharpness;  // (B, T, R)
};

// The parts of a step. Sizes: a content lookup has H keys whatever they are for.
struct ContentWeights {
  DType dtype;
  int64_t batch, slots, width, heads;
  const void *memory, *keys, *strengths;
  const uint8_t* slot_mask;  // (B, N)
  void* weights;             // (B, H, N); backward reads it
  const void* grad;
  void *d_memory, *d_keys, *d_strengths;
};

struct Sharpen {
  DType dtype;
  int64_t rows, size;
  const void *weights, *gamma;
  void* sharpened;  // backward reads it
  const void* grad;
  void *d_weights, *d_gamma;
};

struct Allocation {
  DType dtype;
  int64_t batch, slots;
  const void* usage;
  void* weights;
  const void* grad;
  void* d_usage;
};

struct UsageUpdate {
  DType dtype;
  int64_t batch, slots, read_heads, write_heads;
  const void *usage, *write_weights, *read_weights, *free_gates;
  bool detach_write;
  void* updated;
  const void* grad;
  void *d_usage, *d_write_weights, *d_read_weights, *d_free_gates;
};

struct LinksUpdate {
  DType dtype;
  int64_t rows, slots;  // rows: B H
  const void *links, *precedence, *write_weights;
  void *updated, *followed;
  const void *grad_links, *grad_precedence;
  void *d_links, *d_precedence, *d_write_weights;
};

struct Directional {
  DType dtype;
  int64_t batch, slots, read_heads, write_heads;
  const void *links, *read_weights;
  void *ahead, *back;
  const void *grad_ahead, *grad_back;
  void *d_links, *d_read_weights;
};

struct ReadMemory {
  DType dtype;
  int64_t batch, slots, width, heads;
  const void *memory, *weights;
  void* reads;
  const void* grad;
  void *d_memory, *d_weights;
};

struct WriteMemory {
  DType dtype;
  int64_t batch, slots, width, heads;
  const void *memory, *weights, *erase_vectors, *write_vectors;
  void* written;
  const void* grad;
  void *d_memory, *d_weights, *d_erase_vectors, *d_write_vectors;
};

namespace cpu {

struct MemoryTable {
  void (*forward)(const MemoryForward&, ParallelFor);
  void (*backward)(const MemoryBackward&, ParallelFor);
  void (*content_forward)(const ContentWeights&, ParallelFor);
  void (*content_backward)(const ContentWeights&, ParallelFor);
  void (*sharpen_forward)(const Sharpen&, ParallelFor);
  void (*sharpen_backward)(const Sharpen&, ParallelFor);
  void (*allocation_forward)(const Allocation&, ParallelFor);
  void (*allocation_backward)(const Allocation&, ParallelFor);
  void (*usage_forward)(const UsageUpdate&, ParallelFor);
  void (*usage_backward)(const UsageUpdate&, ParallelFor);
  void (*links_forward)(const LinksUpdate&, ParallelFor);
  void (*links_backward)(const LinksUpdate&, ParallelFor);
  void (*directional_forward)(const Directional&, ParallelFor);
  void (*directional_backward)(const Directional&, ParallelFor);
  void (*read_forward)(const ReadMemory&, ParallelFor);
  void (*read_backward)(const ReadMemory&, ParallelFor);
  void (*write_forward)(const WriteMemory&, ParallelFor);
  void (*write_backward)(const WriteMemory&, ParallelFor);
};

}  // namespace cpu

}  // namespace memkern
