// The threads of a block as fibers that take turns: see emulator.h.
#include "emulator.h"

#include <memory>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulator {
namespace {

constexpr std::size_t STACK_BYTES = 128 << 10;
constexpr int MAX_THREADS = 1024;

struct Copy {
    unsigned char* to;
    const unsigned char* from;
    int bytes, bytes_read;
};

/// Threads that wait for each other. Arrivals of one round complete it once every live thread has come.
struct Barrier {
    int live = 0, arrived = 0;
    unsigned long round = 0;
};

struct Warp {
    Barrier barrier;
    unsigned char slots[2][WARP][SLOT_BYTES];
};

struct Fiber {
    Context context;
    Warp* warp = nullptr;
    bool done = false;
    std::vector<std::vector<Copy>> groups;
    std::vector<Copy> open_group;
    std::unique_ptr<unsigned char[]> stack;
#if defined(__x86_64__)
    void* stack_pointer = nullptr;
#else
    ucontext_t machine;
#endif
};

struct Block {
    const Registered* kernel;
    void** arguments;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    std::vector<unsigned char> shared;
    Barrier barrier;
    Fiber* running = nullptr;
    unsigned long progress = 0;
#if defined(__x86_64__)
    void* scheduler = nullptr;
#else
    ucontext_t scheduler;
#endif
};

thread_local Block* block = nullptr;

[[noreturn]] void fail(const char* problem) {
    const Context& at = context();
    std::fprintf(stderr, "emulator: kernel %s, block (%u, %u, %u), thread %u: %s\n", block->kernel->name, at.block.x,
                 at.block.y, at.block.z, at.thread.x, problem);
    std::abort();
}

#if defined(__x86_64__)
extern "C" void emulator_switch(void** save, void* load);
// The registers that a call preserves, on the stack of whoever stops running.
asm(R"(
.text
.globl emulator_switch
emulator_switch:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret
)");
void resume(Fiber& fiber) { emulator_switch(&block->scheduler, fiber.stack_pointer); }
void yield() { emulator_switch(&block->running->stack_pointer, block->scheduler); }
#else
void resume(Fiber& fiber) { swapcontext(&block->scheduler, &fiber.machine); }
void yield() { swapcontext(&block->running->machine, &block->scheduler); }
#endif

void release_if_complete(Barrier& barrier) {
    if (barrier.live > 0 && barrier.arrived == barrier.live) {
        barrier.arrived = 0;
        ++barrier.round;
        ++block->progress;
    }
}

void wait(Barrier& barrier) {
    const unsigned long round = barrier.round;
    ++barrier.arrived;
    release_if_complete(barrier);
    while (barrier.round == round) yield();
}

void leave(Barrier& barrier) {
    --barrier.live;
    release_if_complete(barrier);
}

/// Where a fiber begins; never returns.
void fiber_main() {
    Fiber& fiber = *block->running;
    block->kernel->call(block->kernel->kernel, block->arguments);
    for (const auto& group : fiber.groups)
        if (!group.empty()) fail("asynchronous copies that nobody waited for");
    fiber.done = true;
    ++block->progress;
    leave(fiber.warp->barrier);
    leave(block->barrier);
    yield();
}

void prepare(Fiber& fiber) {
    fiber.done = false;
    fiber.groups.clear();
    fiber.open_group.clear();
    if (!fiber.stack) fiber.stack.reset(new unsigned char[STACK_BYTES]);
#if defined(__x86_64__)
    // As if fiber_main had been called from nowhere: six registers to pop, then its address to return to. At its
    // first instruction the stack is eight bytes off a multiple of 16, as after any call.
    auto top = reinterpret_cast<std::uintptr_t>(fiber.stack.get() + STACK_BYTES) & ~std::uintptr_t{15};
    void** at = reinterpret_cast<void**>(top) - 1;
    *--at = reinterpret_cast<void*>(&fiber_main);
    for (int i = 0; i < 6; ++i) *--at = nullptr;
    fiber.stack_pointer = at;
#else
    getcontext(&fiber.machine);
    fiber.machine.uc_stack.ss_sp = fiber.stack.get();
    fiber.machine.uc_stack.ss_size = STACK_BYTES;
    fiber.machine.uc_link = nullptr;
    makecontext(&fiber.machine, fiber_main, 0);
#endif
}

/// Runs the threads of one block to their ends.
void run_block() {
    std::memset(block->shared.data(), 0xff, block->shared.size());
    block->barrier = Barrier{static_cast<int>(block->fibers.size()), 0, 0};
    for (std::size_t i = 0; i < block->warps.size(); ++i)
        block->warps[i].barrier = Barrier{min<int>(WARP, static_cast<int>(block->fibers.size() - i * WARP)), 0, 0};
    for (Fiber& fiber : block->fibers) prepare(fiber);
    std::size_t left = block->fibers.size();
    while (left > 0) {
        const unsigned long before = block->progress;
        for (Fiber& fiber : block->fibers) {
            if (fiber.done) continue;
            block->running = &fiber;
            resume(fiber);
            if (fiber.done) --left;
        }
        if (block->progress == before && left > 0) fail("threads wait for others that never come");
    }
}

}  // namespace

Context& context() { return block->running->context; }

unsigned char* shared_memory() {
    const auto address = reinterpret_cast<std::uintptr_t>(block->shared.data());
    return reinterpret_cast<unsigned char*>((address + 127) & ~std::uintptr_t{127});
}

void block_barrier() { wait(block->barrier); }

Exchange::Exchange(const void* value, int bytes) {
    Warp& warp = *block->running->warp;
    // Two sets of slots: nobody writes into this one again before all lanes have come to the next exchange.
    auto& mine = warp.slots[warp.barrier.round & 1];
    std::memcpy(mine[block->running->context.lane], value, static_cast<std::size_t>(bytes));
    slots = mine;
    wait(warp.barrier);
}

const void* Exchange::peer(int lane) const { return slots[lane]; }

void check_alignment(const void* address, int bytes) {
    if (reinterpret_cast<std::uintptr_t>(address) % static_cast<unsigned>(bytes) != 0)
        fail("an address that is not a multiple of the access");
}

void async_copy(void* to, const void* from, int bytes, int bytes_read) {
    check_alignment(to, bytes);
    if (bytes_read > 0) check_alignment(from, bytes);
    block->running->open_group.push_back(
        {static_cast<unsigned char*>(to), static_cast<const unsigned char*>(from), bytes, bytes_read});
}

void async_commit() {
    Fiber& fiber = *block->running;
    fiber.groups.push_back(std::move(fiber.open_group));
    fiber.open_group.clear();
}

// Copies happen at the latest moment that the hardware allows: a missing wait shows.
void async_wait(int groups_left) {
    auto& groups = block->running->groups;
    while (static_cast<int>(groups.size()) > groups_left) {
        for (const Copy& copy : groups.front()) {
            std::memset(copy.to, 0, static_cast<std::size_t>(copy.bytes));
            std::memcpy(copy.to, copy.from, static_cast<std::size_t>(copy.bytes_read));
        }
        groups.erase(groups.begin());
    }
}

}  // namespace emulator

/// Runs a kernel over its whole grid. Returns 0, 1 if there is none of that name, 2 if the block has more threads than
/// the kernel was declared for.
extern "C" int emulator_launch(const char* name, const unsigned grid[3], unsigned threads, unsigned shared_bytes,
                               void** arguments) {
    using namespace emulator;
    const Registered* kernel = Registered::first();
    while (kernel != nullptr && std::strcmp(kernel->name, name) != 0) kernel = kernel->next;
    if (kernel == nullptr) return 1;
    if (threads == 0 || threads > static_cast<unsigned>(min(kernel->max_threads, MAX_THREADS))) return 2;
    thread_local Block state;
    state.kernel = kernel;
    state.arguments = arguments;
    if (state.fibers.size() != threads) {
        state.fibers = std::vector<Fiber>(threads);
        state.warps = std::vector<Warp>((threads + WARP - 1) / WARP);
    }
    state.shared.resize(shared_bytes + 128);
    block = &state;
    for (unsigned i = 0; i < threads; ++i) {
        Fiber& fiber = state.fibers[i];
        fiber.context.thread = Dim3{i, 0, 0};
        fiber.context.block_dim = Dim3{threads, 1, 1};
        fiber.context.grid_dim = Dim3{grid[0], grid[1], grid[2]};
        fiber.context.lane = static_cast<int>(i) % WARP;
        fiber.warp = &state.warps[i / WARP];
    }
    for (unsigned z = 0; z < grid[2]; ++z)
        for (unsigned y = 0; y < grid[1]; ++y)
            for (unsigned x = 0; x < grid[0]; ++x) {
                for (Fiber& fiber : state.fibers) fiber.context.block = Dim3{x, y, z};
                run_block();
            }
    block = nullptr;
    return 0;
}
