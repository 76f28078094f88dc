/* Instructions that C has no words for. */
#ifndef CPU_H
#define CPU_H
#include "guest.h"

static inline void outb(u16 port, u8 value) { __asm__ volatile("outb %0,%1" ::"a"(value), "Nd"(port)); }
static inline void outw(u16 port, u16 value) { __asm__ volatile("outw %0,%1" ::"a"(value), "Nd"(port)); }
static inline void outl(u16 port, u32 value) { __asm__ volatile("outl %0,%1" ::"a"(value), "Nd"(port)); }
static inline u8 inb(u16 port) { u8 value; __asm__ volatile("inb %1,%0" : "=a"(value) : "Nd"(port)); return value; }
static inline u16 inw(u16 port) { u16 value; __asm__ volatile("inw %1,%0" : "=a"(value) : "Nd"(port)); return value; }
static inline u32 inl(u16 port) { u32 value; __asm__ volatile("inl %1,%0" : "=a"(value) : "Nd"(port)); return value; }

/* Stores before it are seen by a device before loads after it are done. */
static inline void memory_barrier(void) { __asm__ volatile("lock; addl $0,(%%esp)" ::: "memory"); }

static inline void interrupts_off(void) { __asm__ volatile("cli" ::: "memory"); }
static inline void interrupts_on(void) { __asm__ volatile("sti" ::: "memory"); }
/* STI takes effect after the next instruction, so no interrupt fits between the two. */
static inline void interrupts_on_and_halt(void) { __asm__ volatile("sti; hlt" ::: "memory"); }

/* 64 by 32 bits without libgcc: schoolbook, in base 2^32. */
static inline u64 divide(u64 value, u32 divisor, u32 *remainder)
{
    u32 high = value >> 32, low = value, quotient_high = high / divisor, quotient_low, rest;

    __asm__("divl %4" : "=a"(quotient_low), "=d"(rest) : "0"(low), "1"(high % divisor), "rm"(divisor));
    if (remainder)
        *remainder = rest;
    return (u64)quotient_high << 32 | quotient_low;
}

static inline void set_words(u32 *to, u32 value, u32 count)
{
    __asm__ volatile("rep stosl" : "+D"(to), "+c"(count) : "a"(value) : "memory");
}

#endif
