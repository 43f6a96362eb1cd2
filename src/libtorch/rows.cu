// Kernels over rows of activations, compiled behind kernels.cu. Those that add along a row give it to a team of threads, which have
// some of its numbers each; on the CPU a team is one thread.

#ifdef __CUDA_ARCH__
const unsigned TEAM = 128;

// Adds up two numbers over the threads of each team of a block, all of which come here.
__device__ inline void add_up(float &one, float &other) {
  __shared__ float ones[THREADS / WARP], others[THREADS / WARP];
  for (unsigned distance = WARP / 2; distance > 0; distance /= 2) {
    one += __shfl_xor_sync(0xFFFFFFFFu, one, distance);
    other += __shfl_xor_sync(0xFFFFFFFFu, other, distance);
  }
  // Those of the time before have been read.
  wait_for_block();
  if (threadIdx.x % WARP == 0) {
    ones[threadIdx.x / WARP] = one;
    others[threadIdx.x / WARP] = other;
  }
  wait_for_block();
  const unsigned first = threadIdx.x / TEAM * (TEAM / WARP);
  one = ones[first];
  other = others[first];
  for (unsigned warp = first + 1; warp < first + TEAM / WARP; warp++) {
    one += ones[warp];
    other += others[warp];
  }
}
#else
const unsigned TEAM = 1;

inline void add_up(float &, float &) {}
#endif

// The widest row that a team takes, of whole groups, and how many blocks of four of its numbers a thread has at most.
const int WIDEST = 1024;
const int OWN = WIDEST / NUMBERS / TEAM;

// The pattern of dropout.rs: where the random number of an element is at most `limit`, its factor is `scale`, elsewhere zero.
// What is drawn for a row is a function of its token's position, its example's slot and the place in the network.
struct Pattern {
  // On the device, so that what is recorded can be started again with another. There is no pattern if there is none.
  const unsigned *key;
  unsigned limit;
  float scale;
  unsigned site;
  // Of each row, or null: rows that examples share have no slot, and stand there in copies of so many; others without a position
  // are each of an example.
  const long long *positions;
  const long long *slots;
  long long shared;
};

struct DropArguments {
  Pattern pattern;
  // In float32, or in bfloat16.
  const void *numbers;
  void *dropped;
  int halves;
  long long rows;
  long long width;
};

// From here on rows and vectors are in bfloat16, but for those of tables; rows stand one behind the other.

struct NormArguments {
  Pattern pattern;
  const unsigned short *input;
  const unsigned short *residual;
  const unsigned short *scale;
  const unsigned short *shift;
  long long rows;
  long long width;
  float epsilon;
  // What is normalised.
  unsigned short *sums;
  unsigned short *output;
  // One for each row.
  float *means;
  float *inverse_deviations;
};

struct NormBackwardArguments {
  Pattern pattern;
  const unsigned short *gradient;
  const unsigned short *sums;
  const unsigned short *scale;
  const float *means;
  const float *inverse_deviations;
  long long rows;
  long long width;
  unsigned short *to_residual;
  unsigned short *to_input;
  // Of each block: sums over its rows of the gradients of scale, of shift and of the input, [3, width].
  float *parts;
};

struct GeluBackwardArguments {
  const unsigned short *gradient;
  const unsigned short *input;
  // Of a multiple of four numbers.
  long long rows;
  long long width;
  long long rows_of_part;
  unsigned short *to_input;
  // Of each part: sums over its rows of the gradient of the input.
  float *sums;
};

struct EntriesArguments {
  // The gradient of what was looked up, in float32, and the entry of each row.
  const float *gradient;
  const long long *entries;
  long long rows;
  long long width;
  // Sums over the rows of one entry in a chunk of rows, at the first of them; and whether a row is such a first one.
  float *sums;
  int *is_first;
  // The table's gradient: rows of entries that were looked up are added to.
  float *table;
};

struct PartEntriesArguments {
  const float *numbers;
  const long long *entries;
  long long rows;
  long long width;
  // Where the rows of each part end, the last with all.
  const long long *ends;
  // Sums over the rows of one entry in a part, at the first of them, and zeros at the others.
  float *sums;
};

// Rows in which the first of each entry gathers the others of its own; then such are gathered from all chunks.
const unsigned CHUNK = 128;
// Chunks that are gathered from at a time.
const unsigned CHUNKS = 256;

// Computes the factors of a block of a row.
__device__ inline void factors_of_row(const Pattern &pattern, long long row, unsigned block, float factors[NUMBERS]) {
  if (!pattern.key) {
    for (int word = 0; word < NUMBERS; word++) factors[word] = 1.0f;
    return;
  }
  const long long shared = pattern.slots ? 0 : row % pattern.shared;
  unsigned words[NUMBERS] = {block, (unsigned)(pattern.positions ? pattern.positions[row] : shared),
                             pattern.slots ? (unsigned)pattern.slots[row] : 0xFFFFFFFFu, pattern.site};
  philox(words, pattern.key);
  for (int word = 0; word < NUMBERS; word++) factors[word] = words[word] <= pattern.limit ? pattern.scale : 0.0f;
}

// Where in a row a number of a block is.
__device__ inline unsigned column(unsigned block, unsigned word) {
  return block / LANES * (LANES * NUMBERS) + word * LANES + block % LANES;
}

// A thread of a team has every so many blocks of a row: which of them is its own with a number, and where in the row the first is,
// and how far behind that a number of one of them. The last is a constant in code without loops.
__device__ inline unsigned own_block(unsigned own) { return own * TEAM + threadIdx.x % TEAM; }
__device__ inline unsigned first_column() { return column(threadIdx.x % TEAM, 0); }
__device__ inline unsigned distance(unsigned own, unsigned word) { return column(own * TEAM, word); }

// Whether no row from `start` to the row has its entry; all threads of a block come here, and wait before they come again.
__device__ inline bool comes_first(const long long *entries, long long start, long long row) {
  __shared__ int comes_later;
  if (threadIdx.x == 0) comes_later = 0;
  wait_for_block();
  for (long long other = start + threadIdx.x; other < row; other += blockDim.x)
    if (entries[other] == entries[row]) comes_later = 1;
  wait_for_block();
  return !comes_later;
}

// Adds up the rows from one of an entry to before the end that have the same entry, in its place among the sums.
__device__ inline void gather(const float *rows, const long long *entries, long long row, long long end, long long width, float *sums) {
  const long long entry = entries[row];
  // A thread has several columns at a time, so that the memory has much to do.
  for (long long first = threadIdx.x; first < width; first += blockDim.x * NUMBERS) {
    float own[NUMBERS] = {};
    for (long long other = row; other < end; other++) {
      if (entries[other] != entry) continue;
#pragma unroll
      for (int number = 0; number < NUMBERS; number++) {
        const long long column = first + number * blockDim.x;
        if (column < width) own[number] += rows[other * width + column];
      }
    }
#pragma unroll
    for (int number = 0; number < NUMBERS; number++) {
      const long long column = first + number * blockDim.x;
      if (column < width) sums[row * width + column] = own[number];
    }
  }
}

// A GPU's own approximations, to within a few units in the last place; what is too small becomes zero.
__device__ inline float reciprocal(float value) {
#ifdef __CUDA_ARCH__
  asm("rcp.approx.ftz.f32 %0, %0;" : "+f"(value));
  return value;
#else
  return 1.0f / value;
#endif
}

__device__ inline float power_of_two(float value) {
#ifdef __CUDA_ARCH__
  asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(value));
  return value;
#else
  return exp2f(value);
#endif
}

// Φ(x) + x φ(x), the derivative of x Φ(x), to within 2e-7: Φ by formula 7.1.26 of Abramowitz and Stegun, Handbook of Mathematical
// Functions, which needs no other exponential than φ.
__device__ inline float slope_of_gelu(float value) {
  const float exponential = power_of_two(value * value * -0.72134752044448170f);
  const float inverse = reciprocal(fmaf(fabsf(value), 0.23164189f, 1.0f));
  float series = fmaf(inverse, 1.061405429f, -1.453152027f);
  series = fmaf(inverse, series, 1.421413741f);
  series = fmaf(inverse, series, -0.284496736f);
  series = fmaf(inverse, series, 0.254829592f);
  // Φ(-|x|).
  const float tail = 0.5f * inverse * series * exponential;
  return fmaf(value * exponential, 0.39894228040143268f, value < 0.0f ? tail : 1.0f - tail);
}

extern "C" {

__global__ void drop(DropArguments arguments) {
  const long long blocks = (arguments.width + LANES * NUMBERS - 1) / (LANES * NUMBERS) * LANES;
  for (long long item = thread(); item < arguments.rows * blocks; item += threads()) {
    const long long row = item / blocks;
    const unsigned block = item % blocks;
    float factors[NUMBERS];
    factors_of_row(arguments.pattern, row, block, factors);
    for (int word = 0; word < NUMBERS; word++) {
      const long long at = row * arguments.width + column(block, word);
      if (column(block, word) >= arguments.width) continue;
      if (arguments.halves) {
        const unsigned short *numbers = (const unsigned short *)arguments.numbers;
        ((unsigned short *)arguments.dropped)[at] = rounded(widened(numbers[at]) * factors[word]);
      } else {
        ((float *)arguments.dropped)[at] = ((const float *)arguments.numbers)[at] * factors[word];
      }
    }
  }
}

// Layer normalisation of the sum of a residual and what dropout leaves of an input.
__global__ void __launch_bounds__(THREADS, 2) add_and_norm(NormArguments arguments) {
  const unsigned width = arguments.width, blocks = width / NUMBERS, teams = blockDim.x / TEAM;
  const unsigned short *scale = arguments.scale + first_column(), *shift = arguments.shift + first_column();
  for (long long first = blockIdx.x * teams; first < arguments.rows; first += gridDim.x * teams) {
    // A team without a row goes along, since the block waits for all.
    const bool has_row = first + threadIdx.x / TEAM < arguments.rows;
    const long long row = has_row ? first + threadIdx.x / TEAM : first;
    const long long start = row * width + first_column();
    const unsigned short *input = arguments.input + start, *residual = arguments.residual + start;
    unsigned short *sums = arguments.sums + start, *output = arguments.output + start;
    float values[OWN][NUMBERS], residuals[OWN][NUMBERS];
    // Read before anything is computed, so that the memory has much to do at a time.
#pragma unroll
    for (int own = 0; own < OWN; own++) {
      if (own_block(own) >= blocks) continue;
#pragma unroll
      for (int word = 0; word < NUMBERS; word++) {
        values[own][word] = widened(input[distance(own, word)]);
        residuals[own][word] = widened(residual[distance(own, word)]);
      }
    }
    float sum = 0.0f, none = 0.0f;
#pragma unroll
    for (int own = 0; own < OWN; own++) {
      if (own_block(own) >= blocks) continue;
      float factors[NUMBERS];
      factors_of_row(arguments.pattern, row, own_block(own), factors);
#pragma unroll
      for (int word = 0; word < NUMBERS; word++) {
        const float dropped = widened(rounded(values[own][word] * factors[word]));
        const unsigned short half = rounded(dropped + residuals[own][word]);
        if (has_row) sums[distance(own, word)] = half;
        values[own][word] = widened(half);
        sum += values[own][word];
      }
    }
    add_up(sum, none);
    const float mean = sum / width;
    float squares = 0.0f;
#pragma unroll
    for (int own = 0; own < OWN; own++) {
      if (own_block(own) >= blocks) continue;
#pragma unroll
      for (int word = 0; word < NUMBERS; word++) {
        values[own][word] -= mean;
        squares += values[own][word] * values[own][word];
      }
    }
    add_up(squares, none);
    const float inverse_deviation = 1.0f / sqrtf(squares / width + arguments.epsilon);
    if (!has_row) continue;
#pragma unroll
    for (int own = 0; own < OWN; own++) {
      if (own_block(own) >= blocks) continue;
#pragma unroll
      for (int word = 0; word < NUMBERS; word++) {
        const float normal = values[own][word] * inverse_deviation;
        const float scaled = normal * widened(scale[distance(own, word)]);
        output[distance(own, word)] = rounded(scaled + widened(shift[distance(own, word)]));
      }
    }
    if (threadIdx.x % TEAM == 0) {
      arguments.means[row] = mean;
      arguments.inverse_deviations[row] = inverse_deviation;
    }
  }
}

__global__ void __launch_bounds__(THREADS, 2) add_and_norm_backward(NormBackwardArguments arguments) {
  const unsigned width = arguments.width, blocks = width / NUMBERS, teams = blockDim.x / TEAM;
  const unsigned short *scale = arguments.scale + first_column();
  float to_scale[OWN][NUMBERS] = {}, to_shift[OWN][NUMBERS] = {}, to_input[OWN][NUMBERS] = {};
  for (long long first = blockIdx.x * teams; first < arguments.rows; first += gridDim.x * teams) {
    const bool has_row = first + threadIdx.x / TEAM < arguments.rows;
    const long long row = has_row ? first + threadIdx.x / TEAM : first;
    const float mean = arguments.means[row], inverse_deviation = arguments.inverse_deviations[row];
    const long long start = row * width + first_column();
    const unsigned short *gradient = arguments.gradient + start, *sums = arguments.sums + start;
    unsigned short *to_residual = arguments.to_residual + start, *to_own = arguments.to_input + start;
    float gradients[OWN][NUMBERS], normals[OWN][NUMBERS];
#pragma unroll
    for (int own = 0; own < OWN; own++) {
      if (own_block(own) >= blocks) continue;
#pragma unroll
      for (int word = 0; word < NUMBERS; word++) {
        gradients[own][word] = has_row ? widened(gradient[distance(own, word)]) : 0.0f;
        normals[own][word] = widened(sums[distance(own, word)]);
      }
    }
    float sum = 0.0f, sum_with_normals = 0.0f;
#pragma unroll
    for (int own = 0; own < OWN; own++) {
      if (own_block(own) >= blocks) continue;
#pragma unroll
      for (int word = 0; word < NUMBERS; word++) {
        const float normal = (normals[own][word] - mean) * inverse_deviation, gradient = gradients[own][word];
        const float scaled = gradient * widened(scale[distance(own, word)]);
        to_scale[own][word] += gradient * normal;
        to_shift[own][word] += gradient;
        sum += scaled;
        sum_with_normals += scaled * normal;
        normals[own][word] = normal;
        gradients[own][word] = scaled;
      }
    }
    add_up(sum, sum_with_normals);
    sum /= width;
    sum_with_normals /= width;
    if (!has_row) continue;
#pragma unroll
    for (int own = 0; own < OWN; own++) {
      if (own_block(own) >= blocks) continue;
      float factors[NUMBERS];
      factors_of_row(arguments.pattern, row, own_block(own), factors);
#pragma unroll
      for (int word = 0; word < NUMBERS; word++) {
        const float difference = gradients[own][word] - sum - normals[own][word] * sum_with_normals;
        const unsigned short half = rounded(inverse_deviation * difference);
        const unsigned short dropped = rounded(widened(half) * factors[word]);
        to_residual[distance(own, word)] = half;
        to_own[distance(own, word)] = dropped;
        to_input[own][word] += widened(dropped);
      }
    }
  }
  // The teams of a block add up what they have, one after the other.
  __shared__ float totals[LISTS][WIDEST];
  for (unsigned team = 0; team < teams; team++) {
#pragma unroll
    for (int own = 0; own < OWN; own++) {
      if (threadIdx.x / TEAM != team || own_block(own) >= blocks) continue;
#pragma unroll
      for (int word = 0; word < NUMBERS; word++) {
        const unsigned at = first_column() + distance(own, word);
        totals[0][at] = team == 0 ? to_scale[own][word] : totals[0][at] + to_scale[own][word];
        totals[1][at] = team == 0 ? to_shift[own][word] : totals[1][at] + to_shift[own][word];
        totals[2][at] = team == 0 ? to_input[own][word] : totals[2][at] + to_input[own][word];
      }
    }
    wait_for_block();
  }
  for (unsigned at = threadIdx.x; at < LISTS * width; at += blockDim.x)
    arguments.parts[blockIdx.x * LISTS * width + at] = totals[at / width][at % width];
}

// A block is a row's: if it is the first of its entry in the chunk, it gathers.
__global__ void entries_of_chunks(EntriesArguments arguments) {
  for (long long row = blockIdx.x; row < arguments.rows; row += gridDim.x) {
    const long long start = row / CHUNK * CHUNK;
    const long long end = start + CHUNK < arguments.rows ? start + CHUNK : arguments.rows;
    const bool is_first = comes_first(arguments.entries, start, row);
    if (threadIdx.x == 0) arguments.is_first[row] = is_first;
    if (is_first) gather(arguments.gradient, arguments.entries, row, end, arguments.width, arguments.sums);
    wait_for_block();
  }
}

// The same with parts in place of chunks, and zeros where a row is not the first.
__global__ void entries_of_parts(PartEntriesArguments arguments) {
  for (long long row = blockIdx.x; row < arguments.rows; row += gridDim.x) {
    long long part = 0;
    while (arguments.ends[part] <= row) part++;
    const long long start = part == 0 ? 0 : arguments.ends[part - 1];
    // None are gathered where another row gathers.
    const long long end = comes_first(arguments.entries, start, row) ? arguments.ends[part] : row;
    gather(arguments.numbers, arguments.entries, row, end, arguments.width, arguments.sums);
    wait_for_block();
  }
}

// A block is a row's: if it is the first of its entry in all rows, it gathers those of the chunks.
__global__ void entries_of_table(EntriesArguments arguments) {
  __shared__ long long row_of_chunk[CHUNKS];
  for (long long row = blockIdx.x; row < arguments.rows; row += gridDim.x) {
    const long long entry = arguments.entries[row];
    // All threads of the block see the same.
    if (!arguments.is_first[row]) continue;
    const bool gathers = comes_first(arguments.entries, 0, row);
    for (long long start = row / CHUNK * CHUNK; gathers && start < arguments.rows; start += CHUNK * CHUNKS) {
      for (unsigned chunk = threadIdx.x; chunk < CHUNKS; chunk += blockDim.x) row_of_chunk[chunk] = -1;
      wait_for_block();
      const long long end = start + CHUNK * CHUNKS < arguments.rows ? start + CHUNK * CHUNKS : arguments.rows;
      for (long long other = (start > row ? start : row) + threadIdx.x; other < end; other += blockDim.x)
        if (arguments.entries[other] == entry && arguments.is_first[other]) row_of_chunk[(other - start) / CHUNK] = other;
      wait_for_block();
      const unsigned chunks = (end - start + CHUNK - 1) / CHUNK;
      for (long long column = threadIdx.x; column < arguments.width; column += blockDim.x) {
        float sum = arguments.table[entry * arguments.width + column];
        for (unsigned chunk = 0; chunk < chunks; chunk++)
          if (row_of_chunk[chunk] >= 0) sum += arguments.sums[row_of_chunk[chunk] * arguments.width + column];
        arguments.table[entry * arguments.width + column] = sum;
      }
      wait_for_block();
    }
    wait_for_block();
  }
}

// Multiplies a gradient by the derivative of x Φ(x), and sums columns of what comes out over parts of the rows.
__global__ void gelu_backward(GeluBackwardArguments arguments) {
  const long long fours = arguments.width / 4;
  const long long parts = (arguments.rows + arguments.rows_of_part - 1) / arguments.rows_of_part;
  const FourHalves *gradients = (const FourHalves *)arguments.gradient, *inputs = (const FourHalves *)arguments.input;
  for (long long item = thread(); item < parts * fours; item += threads()) {
    const long long part = item / fours, four = item % fours;
    const long long first = part * arguments.rows_of_part;
    const long long end = first + arguments.rows_of_part, last = end < arguments.rows ? end : arguments.rows;
    FourFloats sums = {};
    for (long long row = first; row < last; row += ROWS) {
      FourHalves gradient[ROWS], input[ROWS];
#pragma unroll
      for (int next = 0; next < ROWS; next++) {
        const long long at = (row + next < last ? row + next : row) * fours + four;
        gradient[next] = gradients[at];
        input[next] = inputs[at];
      }
#pragma unroll
      for (int next = 0; next < ROWS; next++) {
        if (row + next >= last) continue;
        FourHalves own;
        for (int number = 0; number < 4; number++) {
          const float slope = slope_of_gelu(widened(input[next].numbers[number]));
          own.numbers[number] = rounded(widened(gradient[next].numbers[number]) * slope);
          sums.numbers[number] += widened(own.numbers[number]);
        }
        ((FourHalves *)arguments.to_input)[(row + next) * fours + four] = own;
      }
    }
    ((FourFloats *)arguments.sums)[item] = sums;
  }
}

}  // extern "C"
