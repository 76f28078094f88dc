/* From the reset vector to C.  The ROM is the last 64 KiB below 4 GiB; QEMU starts the CPU at
   its last 16 bytes in real mode with CS based at 0xffff0000, A20 open. */

        .section .reset, "ax"
        .code16
reset:  jmp     rom_entry
        .balign 16

        .section .rom, "ax"
        .code16
rom_entry:
        cli
        lgdtl   %cs:(gdt_pointer - rom_entry + 0xff00)   /* this section's offset in the ROM */
        mov     %cr0, %eax
        and     $0x9fffffff, %eax               /* caches on: CD and NW are set at reset */
        or      $1, %al                         /* protected mode, and the jump that must follow */
        mov     %eax, %cr0
        ljmpl   $0x08, $protected_mode

        .code32
protected_mode:
        mov     $0x10, %eax
        mov     %eax, %ds
        mov     %eax, %es
        mov     %eax, %fs
        mov     %eax, %gs
        mov     %eax, %ss
        cld
        mov     $image_in_rom, %esi             /* the program, to where it was linked */
        mov     $image_start, %edi
        mov     $image_words, %ecx
        rep movsl
        mov     $bss_start, %edi
        mov     $bss_words, %ecx
        xor     %eax, %eax
        rep stosl
        mov     $stack_top, %esp
        mov     $main, %eax
        call    *%eax

        .balign 8
        /* Flat code, flat data; marked as accessed, for the CPU cannot do that in a ROM. */
gdt:    .quad   0, 0x00cf9b000000ffff, 0x00cf93000000ffff
gdt_pointer:
        .word   . - gdt - 1
        .long   gdt

        .section .note.GNU-stack, "", @progbits
