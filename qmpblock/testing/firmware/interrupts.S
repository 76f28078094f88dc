/* How the CPU comes into interrupt() and back, by vector.
 *
 * The end does what IRET would do, in words that every CPU and KVM's instruction emulator have
 * (em_iret in arch/x86/kvm/emulate.c has none for protected mode: where KVM emulates that mode in
 * place of running it, an IRET is the end of the VM).  The gate is of the same ring, so the stack
 * holds EIP, CS, EFLAGS.  STI takes effect after the instruction that follows it, the far return,
 * which drops the flags: so interrupts do not pile up.  They were on, else none had come. */

        .text
        .code32
        .balign 16
        .globl  interrupt_entries
interrupt_entries:                      /* 16 bytes each, from VECTOR_FIRST on */
        .set    vector, 0x20
        .rept   32
        .balign 16
        pushal
        pushl   $vector
        jmp     common
        .set    vector, vector + 1
        .endr

        .balign 16
common: cld
        call    interrupt
        addl    $4, %esp
        popal
        pushl   8(%esp)                 /* the flags, but for IF */
        andl    $~0x200, (%esp)
        popfl
        sti
        lretl   $4

        .section .note.GNU-stack, "", @progbits
