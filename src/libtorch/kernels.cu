// Kernels of our own. For a GPU they are compiled when it is first used (kernels.cpp); for the CPU, where tests run them
// thread by thread, beside it. So this is C++ that both know, without headers.
//
// Most threads share nothing and write what is theirs. Where some add up together they are those of a block, which on the CPU is one
// thread; sums are made in an order that depends on the numbers of blocks and threads alone. Multiplications and additions are not
// contracted, so that an element becomes the same as on the CPU, to the bit.

#ifdef __CUDA_ARCH__
const unsigned WARP = 32;
__device__ inline void wait_for_block() { __syncthreads(); }
#else
const unsigned WARP = 1;
inline void wait_for_block() {}
#endif
// Threads of a block, at most.
const unsigned THREADS = 512;

// Which gradients of a step count. The masks of random.rs and masking.rs: where the random number of an element is at most
// `limit`, its factor is `scale`, elsewhere zero.
struct Mask {
  unsigned key[2];
  unsigned limit;
  float scale;
  // Whether there is a mask at all.
  int draws;
};

// Numbers of a stretch of the flat buffers: all, a child network's members among them, or those of some groups of 64.
struct Stretch {
  // The first number, whose place in the flat buffer is 64 times `first_group`.
  long long first_group;
  // How many there are in all.
  long long length;
  // How many of them count: members, or those of whole groups with what the last one lacks, or all.
  long long count;
  // Places of members in the stretch, or null.
  const int *members;
  // Which groups of the stretch, in order, or null.
  const int *groups;
};

// The constants of adamw_host.rs.
struct AdamW {
  float decay_before;
  float decay_after;
  float one_minus_beta1;
  float beta2;
  float one_minus_beta2;
  float root_of_correction;
  float step_size;
  float epsilon;
};

struct UpdateArguments {
  Stretch stretch;
  Mask mask;
  AdamW constants;
  // One factor on all gradients.
  const float *factor;
  const float *gradients;
  float *values;
  // Of members or groups only, if there are some, one behind the other.
  float *first_moments;
  float *second_moments;
  // The same weights in bfloat16, or null.
  unsigned short *half;
};

struct SquaresArguments {
  Stretch stretch;
  Mask mask;
  const float *gradients;
  // One sum for each thread.
  double *sums;
};

struct CollectArguments {
  // In bfloat16.
  const unsigned short *gradient;
  float *place;
  long long count;
  // Whether to add to what is there.
  int adds;
};

// Rows, or sums of them, that stand side by side in what is made of them, at most.
const int LISTS = 3;

struct ColumnsArguments {
  // In bfloat16, one row behind the other, each of a multiple of four numbers; the same shape in all lists.
  const unsigned short *numbers[LISTS];
  int lists;
  long long rows;
  long long width;
  // Sums of so many rows at a time, a row of sums of all lists for each.
  long long rows_of_part;
  float *sums;
};

struct TotalsArguments {
  const float *sums;
  long long rows;
  long long width;
  // Null where nobody asks for them.
  float *totals[LISTS];
  // Whether to add to what is there.
  int adds[LISTS];
  int lists;
};

struct LayOutArguments {
  // In units of so many bytes: 2, 4 or 8.
  const void *rows;
  int unit;
  // Units of a row.
  long long width;
  // The row that stands at each place, below zero where none does.
  const long long *row_of_place;
  long long places;
  void *laid_out;
};

struct PartSumsArguments {
  // Rows of numbers, in float32 or bfloat16, and of factors on them, in float32, or null.
  const void *numbers;
  int halves;
  const float *factors;
  long long width;
  // Where the rows of each part end.
  const long long *ends;
  long long parts;
  // A row for each part.
  float *sums;
};

struct PartSquaresArguments {
  // As many numbers for each part as there are sums.
  const float *numbers;
  long long parts;
  long long count;
  float *sums;
};

struct MaskArguments {
  Stretch stretch;
  Mask mask;
  float *values;
};

// A number of a thread's own, and how many threads there are.
__device__ inline long long thread() { return (long long)blockIdx.x * blockDim.x + threadIdx.x; }
__device__ inline long long threads() { return (long long)gridDim.x * blockDim.x; }

struct alignas(8) FourHalves {
  unsigned short numbers[4];
};

struct alignas(16) FourFloats {
  float numbers[4];
};

// bfloat16 is the upper half of float32.
__device__ inline float widened(unsigned short half) {
  union { unsigned bits; float number; } number;
  number.bits = (unsigned)half << 16;
  return number.number;
}

// Rounds to the nearest, of two to the even one; what is not a number stays so.
__device__ inline unsigned short rounded(float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  // Of two numbers, since the instruction for one is several times as slow.
  unsigned halves;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(halves) : "f"(0.0f), "f"(value));
  return (unsigned short)halves;
#else
  union { float number; unsigned bits; } number;
  number.number = value;
  if (value != value) return (unsigned short)(number.bits >> 16 | 0x40);
  return (unsigned short)((number.bits + 0x7FFF + (number.bits >> 16 & 1)) >> 16);
#endif
}

// Numbers that one thread works on at a time: those of one Philox block, every sixteenth of a group of 64.
const int NUMBERS = 4;
const int LANES = 16;

// Place of number `word` of a block, of all blocks side by side.
__device__ inline long long place(long long block, int word) {
  return block / LANES * (LANES * NUMBERS) + word * LANES + block % LANES;
}

// The block of the stretch that one of its groups' blocks is.
__device__ inline long long block_of(const Stretch &stretch, long long block) {
  return stretch.groups ? (long long)stretch.groups[block / LANES] * LANES + block % LANES : block;
}

__device__ inline long long blocks(const Stretch &stretch) {
  return (stretch.count + LANES * NUMBERS - 1) / (LANES * NUMBERS) * LANES;
}

// Computes a block of Philox4x32-10 in place of its counter.
__device__ inline void philox(unsigned words[NUMBERS], const unsigned first_key[2]) {
  unsigned key[2] = {first_key[0], first_key[1]};
  for (int round = 0; round < 10; round++) {
    const unsigned long long first = 0xD2511F53ull * words[0];
    const unsigned long long second = 0xCD9E8D57ull * words[2];
    words[0] = (unsigned)(second >> 32) ^ words[1] ^ key[0];
    words[1] = (unsigned)second;
    words[2] = (unsigned)(first >> 32) ^ words[3] ^ key[1];
    words[3] = (unsigned)first;
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
}

// Computes the factors of a block of the stretch.
__device__ inline void factors(const Mask &mask, const Stretch &stretch, long long block, float factors[NUMBERS]) {
  if (!mask.draws) {
    for (int word = 0; word < NUMBERS; word++) factors[word] = 1.0f;
    return;
  }
  unsigned words[NUMBERS] = {(unsigned)(stretch.first_group * LANES + block), 0, 0, 0};
  philox(words, mask.key);
  for (int word = 0; word < NUMBERS; word++) factors[word] = words[word] <= mask.limit ? mask.scale : 0.0f;
}

// The update of `torch.optim.AdamW`, as in adamw_host.rs.
__device__ inline void step(const AdamW &constants, float gradient, float &value, float &first, float &second) {
  first += constants.one_minus_beta1 * (gradient - first);
  second = second * constants.beta2 + constants.one_minus_beta2 * gradient * gradient;
  const float root = sqrtf(second) / constants.root_of_correction + constants.epsilon;
  value = (value * constants.decay_before - constants.step_size * (first / root)) * constants.decay_after;
}

template <typename Unit>
__device__ inline void lay_out_units(const LayOutArguments &arguments) {
  for (long long item = thread(); item < arguments.places * arguments.width; item += threads()) {
    const long long row = arguments.row_of_place[item / arguments.width];
    const Unit *units = (const Unit *)arguments.rows + row * arguments.width;
    ((Unit *)arguments.laid_out)[item] = row < 0 ? 0 : units[item % arguments.width];
  }
}

extern "C" {

__global__ void update(UpdateArguments arguments) {
  const Stretch stretch = arguments.stretch;
  const float factor = *arguments.factor;
  if (stretch.members) {
    for (long long member = thread(); member < stretch.count; member += threads()) {
      const int at = stretch.members[member];
      step(arguments.constants, arguments.gradients[at] * factor, arguments.values[at], arguments.first_moments[member],
           arguments.second_moments[member]);
      if (arguments.half) arguments.half[at] = rounded(arguments.values[at]);
    }
    return;
  }
  for (long long block = thread(); block < blocks(stretch); block += threads()) {
    // Read before anything is computed, so that the memory has much to do at a time.
    float gradients[NUMBERS], values[NUMBERS], first[NUMBERS], second[NUMBERS], masks[NUMBERS];
    const long long own = block_of(stretch, block);
    for (int word = 0; word < NUMBERS; word++) {
      const long long at = place(own, word), moment = place(block, word);
      if (at >= stretch.length) continue;
      gradients[word] = arguments.gradients[at];
      values[word] = arguments.values[at];
      first[word] = arguments.first_moments[moment];
      second[word] = arguments.second_moments[moment];
    }
    factors(arguments.mask, stretch, own, masks);
    for (int word = 0; word < NUMBERS; word++) {
      const long long at = place(own, word), moment = place(block, word);
      if (at >= stretch.length) continue;
      step(arguments.constants, gradients[word] * masks[word] * factor, values[word], first[word], second[word]);
      arguments.values[at] = values[word];
      arguments.first_moments[moment] = first[word];
      arguments.second_moments[moment] = second[word];
      if (arguments.half) arguments.half[at] = rounded(values[word]);
    }
  }
}

__global__ void squares(SquaresArguments arguments) {
  const Stretch stretch = arguments.stretch;
  double sum = 0.0;
  if (stretch.members) {
    for (long long member = thread(); member < stretch.count; member += threads()) {
      const float gradient = arguments.gradients[stretch.members[member]];
      sum += (double)gradient * gradient;
    }
  } else {
    for (long long block = thread(); block < blocks(stretch); block += threads()) {
      float gradients[NUMBERS], masks[NUMBERS];
      const long long own = block_of(stretch, block);
      for (int word = 0; word < NUMBERS; word++) {
        const long long at = place(own, word);
        gradients[word] = at < stretch.length ? arguments.gradients[at] : 0.0f;
      }
      factors(arguments.mask, stretch, own, masks);
      for (int word = 0; word < NUMBERS; word++) {
        const double gradient = gradients[word] * masks[word];
        sum += gradient * gradient;
      }
    }
  }
  arguments.sums[thread()] = sum;
}

__global__ void mask(MaskArguments arguments) {
  const Stretch stretch = arguments.stretch;
  for (long long block = thread(); block < blocks(stretch); block += threads()) {
    float masks[NUMBERS];
    factors(arguments.mask, stretch, block, masks);
    for (int word = 0; word < NUMBERS; word++) {
      const long long at = place(block, word);
      if (at < stretch.count) arguments.values[at] *= masks[word];
    }
  }
}

// Puts a gradient to its place in the flat buffer.
__global__ void collect(CollectArguments arguments) {
  const FourHalves *gradient = (const FourHalves *)arguments.gradient;
  FourFloats *place = (FourFloats *)arguments.place;
  const long long fours = arguments.count / 4;
  for (long long four = thread(); four < fours; four += threads()) {
    const FourHalves own = gradient[four];
    FourFloats sums = {};
    if (arguments.adds) sums = place[four];
    for (int number = 0; number < 4; number++) {
      const float value = widened(own.numbers[number]);
      sums.numbers[number] = arguments.adds ? sums.numbers[number] + value : value;
    }
    place[four] = sums;
  }
  for (long long at = fours * 4 + thread(); at < arguments.count; at += threads()) {
    const float value = widened(arguments.gradient[at]);
    arguments.place[at] = arguments.adds ? arguments.place[at] + value : value;
  }
}

// Rows that a thread reads at a time, before anything is computed, so that the memory has much to do.
const int ROWS = 8;

// Sums columns over parts of the rows.
__global__ void columns(ColumnsArguments arguments) {
  const long long fours = arguments.width / 4;
  const long long parts = (arguments.rows + arguments.rows_of_part - 1) / arguments.rows_of_part;
  for (long long item = thread(); item < parts * arguments.lists * fours; item += threads()) {
    const long long part = item / (arguments.lists * fours), list = item / fours % arguments.lists, four = item % fours;
    const FourHalves *numbers = (const FourHalves *)arguments.numbers[0];
#pragma unroll
    for (int other = 1; other < LISTS; other++)
      if (list == other) numbers = (const FourHalves *)arguments.numbers[other];
    const long long first = part * arguments.rows_of_part;
    const long long end = first + arguments.rows_of_part, last = end < arguments.rows ? end : arguments.rows;
    FourFloats sums = {};
    for (long long row = first; row < last; row += ROWS) {
      FourHalves own[ROWS];
#pragma unroll
      for (int next = 0; next < ROWS; next++) own[next] = numbers[(row + next < last ? row + next : row) * fours + four];
#pragma unroll
      for (int next = 0; next < ROWS; next++) {
        if (row + next >= last) continue;
        for (int number = 0; number < 4; number++) sums.numbers[number] += widened(own[next].numbers[number]);
      }
    }
    ((FourFloats *)arguments.sums)[item] = sums;
  }
}

// Sums columns of sums: a thread some rows of one, a block so many columns as a warp has threads.
__global__ void totals(TotalsArguments arguments) {
  __shared__ float parts[THREADS];
  const unsigned columns = arguments.lists * arguments.width, groups = blockDim.x / WARP;
  const unsigned group = threadIdx.x / WARP, own = threadIdx.x % WARP;
  for (unsigned first = blockIdx.x * WARP; first < columns; first += gridDim.x * WARP) {
    const unsigned column = first + own;
    float part = 0.0f;
    if (column < columns) {
#pragma unroll 16
      for (unsigned row = group; row < arguments.rows; row += groups) part += arguments.sums[row * columns + column];
    }
    parts[threadIdx.x] = part;
    wait_for_block();
    if (group == 0 && column < columns) {
      float total = 0.0f;
      for (unsigned other = 0; other < groups; other++) total += parts[other * WARP + own];
      const unsigned list = column / arguments.width, at = column % arguments.width;
#pragma unroll
      for (int number = 0; number < LISTS; number++) {
        float *totals = arguments.totals[number];
        if (list == number && totals) totals[at] = arguments.adds[number] ? totals[at] + total : total;
      }
    }
    wait_for_block();
  }
}

// Puts rows to places, and zeros where there is none.
__global__ void lay_out(LayOutArguments arguments) {
  if (arguments.unit == 8) lay_out_units<unsigned long long>(arguments);
  else if (arguments.unit == 4) lay_out_units<unsigned>(arguments);
  else lay_out_units<unsigned short>(arguments);
}

// Sums the rows of each part.
__global__ void part_sums(PartSumsArguments arguments) {
  const float *floats = (const float *)arguments.numbers;
  const unsigned short *halves = (const unsigned short *)arguments.numbers;
  for (long long item = thread(); item < arguments.parts * arguments.width; item += threads()) {
    const long long part = item / arguments.width, column = item % arguments.width;
    const long long last = arguments.ends[part];
    float sum = 0.0f;
#pragma unroll 8
    for (long long row = part == 0 ? 0 : arguments.ends[part - 1]; row < last; row++) {
      const long long at = row * arguments.width + column;
      const float number = arguments.halves ? widened(halves[at]) : floats[at];
      sum += arguments.factors ? number * arguments.factors[at] : number;
    }
    arguments.sums[item] = sum;
  }
}

// Adds the squares of all parts to sums.
__global__ void part_squares(PartSquaresArguments arguments) {
  for (long long at = thread(); at < arguments.count; at += threads()) {
    float sum = 0.0f;
#pragma unroll 8
    for (long long part = 0; part < arguments.parts; part++) {
      const float number = arguments.numbers[part * arguments.count + at];
      sum += number * number;
    }
    arguments.sums[at] += sum;
  }
}

}  // extern "C"
